"""How losses become updates: learning rate, mixed precision, gradient accumulation, clipping, skipping, EMA."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from util.amp import LossScaler
from util.distributed import dist
from util.lr_sched import CosineSchedule


class MicroStep(NamedTuple):
    """Where a batch stands in its accumulation group of `size` batches."""

    size: int
    first: bool
    last: bool


def locate_in_group(step: int, steps: int, accum_iter: int) -> MicroStep:
    """Return where batch `step` of an epoch of `steps` batches stands in its accumulation group.

    The epoch's last group may be smaller than accum_iter; it makes an update of its own, averaged over the batches
    that it has, so that it is neither lost nor mis-scaled.
    """
    start = step - step % accum_iter
    size = min(accum_iter, steps - start)
    return MicroStep(size, first=step == start, last=step == start + size - 1)


def updates_per_epoch(steps: int, accum_iter: int) -> int:
    """Return the number of updates that an epoch of `steps` batches makes, its last group of them included."""
    return math.ceil(steps / accum_iter)


class Updater:
    """Turns the losses of a model into updates of its weights.

        with updater.micro_step(epoch, step, steps):    # learning rate, autocast, exchange of gradients
            loss = ...
        skipped = updater.backward_and_update(loss)     # None inside an accumulation group

    A batch's loss is divided by the number of batches in its accumulation group. An update whose gradients are not
    finite changes nothing: neither weights, nor the optimiser's state, nor buffers (a probe's BatchNorm statistics).
    The EMA is updated even then, with the unchanged weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: CosineSchedule,
        scaler: LossScaler,
        *,
        accum_iter: int = 1,
        clip_grad: float | None = None,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        """Collect what an update needs, and clear the gradients.

        Args:
            model: The model that is trained, in DDP where there are several ranks.
            optimizer: Optimiser of its parameters.
            schedule: Sets the learning rate at the start of every accumulation group.
            scaler: Loss scaler of the precision.
            accum_iter: Batches per update.
            clip_grad: Largest norm of all gradients together; None: no clipping.
            ema: EMA of the weights, updated after every update, skipped ones, too.
        """
        self.model, self.optimizer, self.schedule, self.scaler = model, optimizer, schedule, scaler
        self.accum_iter, self.clip_grad, self.ema = accum_iter, clip_grad, ema
        self.lr = 0.0
        self.begun = 0  # updates that were begun, the one under way included
        self.part = MicroStep(1, first=True, last=True)
        self.device = next(model.parameters()).device
        self._buffers = list(model.buffers())
        self._buffers_before: list[Tensor] = []
        dist.zero_grad(optimizer)

    @contextmanager
    def micro_step(self, epoch: int, step: int, steps: int) -> Iterator[None]:
        """Open the context in which the caller runs the forward pass of batch `step` of an epoch of `steps` batches.

        It has autocast, and DDP exchanges gradients for a group's last batch only. At the start of an accumulation
        group the learning rate is set. Call `backward_and_update` afterwards, before the next batch.
        """
        self.part = locate_in_group(step, steps, self.accum_iter)
        if self.part.first:
            self.lr = self.schedule.apply(self.optimizer, epoch + step / steps)
            self._buffers_before = [buffer.clone() for buffer in self._buffers]
        # DDP decides in the forward pass whether the backward pass will exchange gradients.
        with dist.grad_sync(self.model, self.part.last), self.scaler.autocast():
            yield

    def backward_and_update(self, loss: Tensor) -> Tensor | None:
        """Add the loss's gradients; at the end of an accumulation group clip them, update weights and EMA, clear them.

        Returns:
            Whether the update was skipped, a boolean tensor on the device; with a fused optimiser nothing has waited
            for it. None if the batch is not the last of its accumulation group.
        """
        self.scaler.backward(loss / self.part.size)
        if not self.part.last:
            return None

        self.begun += 1
        skipped = self.scaler.step(self.optimizer, self.model.parameters(), self.clip_grad)
        for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        if self.ema is not None:
            self.ema.update(dist.unwrap(self.model))
        return skipped

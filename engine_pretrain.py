"""One epoch of masked pre-training."""

from collections.abc import Sized

import torch
from torch import nn

from util import dist
from util.amp import LossScaler, micro_step
from util.log import RunLog
from util.lr_sched import CosineSchedule
from util.meters import Meters, check_finite


def train_one_epoch(
    model: nn.Module,
    loader: Sized,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: LossScaler,
    schedule: CosineSchedule,
    *,
    mask_ratio: float = 0.75,
    accum_iter: int = 1,
    clip_grad: float | None = None,
    log: RunLog | None = None,
    print_freq: int = 20,
) -> dict[str, float]:
    """Train the autoencoder on every batch (imgs [N, C, H, W], anything) of the loader.

    The loss of each batch is divided by the number of batches in its accumulation group; the learning rate is set at
    the start of a group. Returns the epoch's mean loss and learning rate over all ranks. Raises FloatingPointError
    on every rank when the reported loss is not finite.
    """
    model.train()
    optimizer.zero_grad()
    meters, steps = Meters(device), len(loader)

    def report(step: int, means: dict[str, float]) -> None:
        check_finite(means["loss"], epoch, step)
        if log:
            log.scalars(epoch + step / steps, {"train_loss": means["loss"], "lr": means["lr"]})

    for step, (imgs, _) in enumerate(meters.watch(loader, f"epoch {epoch}", print_freq, report)):
        part = micro_step(step, steps, accum_iter)
        if part.first:
            lr = schedule.apply(optimizer, epoch + step / steps)
        imgs = imgs.to(device, non_blocking=True)
        with dist.grad_sync(model, part.last):
            with scaler.autocast():
                loss, _, _ = model(imgs, mask_ratio=mask_ratio)
            scaler.backward(loss / part.size)
        if part.last:
            scaler.step(optimizer, model.parameters(), clip_grad)
        meters.update(loss=loss, lr=lr)
    return meters.averages()

"""The loops that the three jobs share: over the batches of an epoch, and over epochs."""

import time
from collections.abc import Callable, Sized

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import dist
from util.amp import LossScaler, micro_step
from util.log import RunLog
from util.lr_sched import CosineSchedule
from util.meters import Meters, check_finite


def train_epoch(
    model: nn.Module,
    loader: Sized,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: LossScaler,
    schedule: CosineSchedule,
    loss_of: Callable[..., Tensor],
    *,
    accum_iter: int,
    clip_grad: float | None,
    log: RunLog | None,
    loss_tag: str,
    print_freq: int,
) -> dict[str, float]:
    """Train on every batch of the loader; loss_of(*batch) is its mean loss, a scalar on the device.

    The loss of a batch is divided by the number of batches in its accumulation group; the learning rate is set at
    the start of a group. TensorBoard gets the loss as `loss_tag`, and lr. Returns the epoch's mean loss and learning
    rate over all ranks. Raises FloatingPointError, on every rank, when a reported loss is not finite.
    """
    model.train()
    optimizer.zero_grad()
    meters, steps = Meters(device), len(loader)

    def report(step: int, means: dict[str, float]) -> None:
        check_finite(means["loss"], epoch, step)
        if log:
            log.scalars(epoch + step / steps, {loss_tag: means["loss"], "lr": means["lr"]})

    for step, batch in enumerate(meters.watch(loader, f"epoch {epoch}", print_freq, report)):
        part = micro_step(step, steps, accum_iter)
        if part.first:
            lr = schedule.apply(optimizer, epoch + step / steps)
        with dist.grad_sync(model, part.last):
            with scaler.autocast():
                loss = loss_of(*batch)
            scaler.backward(loss / part.size)
        if part.last:
            scaler.step(optimizer, model.parameters(), clip_grad)
        meters.update(loss=loss, lr=lr)
    return meters.averages()


def run_epochs(
    loader: DataLoader,
    epochs: range,
    save_freq: int,
    log: RunLog,
    train: Callable[[int], dict[str, float]],
    save: Callable[[int], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    eval_freq: int = 1,
) -> None:
    """Per epoch: shuffle, train, save a checkpoint (every save_freq epochs and after the last), evaluate (likewise),
    and log.

    log.txt gets train_*, test_*, epoch and n_parameters; the best accuracy so far is printed.
    """
    start, best = time.time(), 0.0
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        stats = {f"train_{name}": value for name, value in train(epoch).items()}
        last = epoch + 1 == epochs.stop
        if last or (epoch + 1) % save_freq == 0:
            save(epoch)
        if evaluate and (last or (epoch + 1) % eval_freq == 0):
            test = evaluate()
            best = max(best, test["acc1"])
            dist.say(f"best accuracy so far: {best:.2f} %")
            stats |= {f"test_{name}": value for name, value in test.items()}
            log.scalars(epoch, {f"perf/test_{name}": value for name, value in test.items()})
        log.epoch({**stats, "epoch": epoch, "n_parameters": log.n_parameters})
    log.close()
    dist.say(f"trained {len(epochs)} epochs in {time.time() - start:.0f} s")

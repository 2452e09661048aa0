"""One epoch of masked pre-training."""

from torch import nn

from util import masking
from util.data.loaders import DeviceLoader
from util.distributed import dist
from util.loop import Run
from util.report.meters import Meters
from util.updater import Updater


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    updater: Updater,
    epoch: int,
    *,
    mask_ratio: float = 0.75,
    mask_sampling: str = "random",
    run: Run | None = None,
    print_freq: int = 20,
) -> dict[str, float]:
    """Pre-train the autoencoder on the epoch's remaining batches: all, unless the run was resumed within the epoch.

    Args:
        model: The autoencoder, in DDP where there are several ranks.
        loader: Yields (imgs [N, C, H, W] on the device, anything).
        updater: Turns losses into updates.
        epoch: Number of the epoch, from 0.
        mask_ratio: Share of the patches that is removed.
        mask_sampling: Which patches are removed, one of util.masking.KINDS.
        run: Logs, saves, and stops where it has to; None: progress lines are printed, and that is all.
        print_freq: Steps between progress lines.

    Returns:
        "loss" and "lr": the epoch's means over all ranks, without losses that are not finite.

    Raises:
        Stopped, FloatingPointError, UserError: As Run.after_update and Run.report do, on every rank.
    """
    model.train()
    grid = dist.unwrap(model).patch_embed.grid_size
    meters = run.start_meters("train_loss", updater) if run else Meters(updater.device)

    # Every print_freq steps the iterator prints a line, and calls run.report.
    for step, (imgs, _) in meters.log_every(loader, print_freq, epoch):
        noise = masking.noise(mask_sampling, len(imgs), grid, imgs.device)  # patches with the smallest noise stay
        with updater.micro_step(epoch, step, len(loader)):
            loss, _, _ = model(imgs, mask_ratio=mask_ratio, noise=noise)
        skipped = updater.backward_and_update(loss)  # None inside an accumulation group

        meters.update(loss=loss, lr=updater.lr)
        if run and skipped is not None:
            run.after_update(step, skipped)  # an update was made or skipped: save on time or on a signal

    if run:
        run.end_of_training()
    return meters.averages()

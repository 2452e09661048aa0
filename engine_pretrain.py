"""One epoch of masked pre-training."""

from collections.abc import Sized

import torch
from torch import Tensor, nn

from util import masking
from util.amp import LossScaler
from util.distributed import dist
from util.loop import Run, train_epoch
from util.lr_sched import CosineSchedule


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
    mask_sampling: str = "random",
    accum_iter: int = 1,
    clip_grad: float | None = None,
    run: Run | None = None,
    print_freq: int = 20,
) -> dict[str, float]:
    """Train the autoencoder on every batch (imgs [N, C, H, W] on the device, anything) of the loader that is left.

    Accumulation, learning rate, result and errors: util.loop.train_epoch.
    """

    def loss_of(imgs: Tensor, _) -> Tensor:
        if mask_sampling == "random":  # the model's own
            return model(imgs, mask_ratio=mask_ratio)[0]
        grid = dist.unwrap(model).patch_embed.grid_size
        return model(imgs, mask_ratio=mask_ratio, noise=masking.noise(mask_sampling, len(imgs), grid, device))[0]

    return train_epoch(
        model,
        loader,
        optimizer,
        device,
        epoch,
        scaler,
        schedule,
        loss_of,
        accum_iter=accum_iter,
        clip_grad=clip_grad,
        run=run,
        loss_tag="train_loss",
        print_freq=print_freq,
    )

"""The learning rate: linear warm-up, then half a cosine, set before every update."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CosineSchedule:
    """Learning rate as a function of the fractional epoch, without a state (paper, appendix A).

    Written by hand because timm's schedulers keep `initial_lr` in the optimiser's groups, which published checkpoints
    lack.

    Attributes:
        lr: Learning rate after warm-up.
        min_lr: Learning rate at the end.
        warmup_epochs: Epochs in which it rises linearly from 0.
        epochs: Epochs of the whole run, warm-up included.
    """

    lr: float
    min_lr: float
    warmup_epochs: float
    epochs: float

    def at(self, epoch: float) -> float:
        """Return the learning rate at a fractional epoch, before a group's own `lr_scale`."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def apply(self, optimizer: torch.optim.Optimizer, epoch: float) -> float:
        """Set every group's learning rate, times its `lr_scale` if it has one, and return the unscaled rate."""
        lr = self.at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

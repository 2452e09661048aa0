"""The learning rate: linear warm-up, then half a cosine, set before every update."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CosineSchedule:
    """Stateless in the fractional epoch (paper, appendix A). Written by hand: timm's schedulers keep `initial_lr` in
    the optimiser's groups, which published checkpoints lack."""

    lr: float
    min_lr: float
    warmup_epochs: float
    epochs: float

    def at(self, epoch: float) -> float:
        """The learning rate at a fractional epoch, before a group's own `lr_scale`."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def apply(self, optimizer: torch.optim.Optimizer, epoch: float) -> float:
        """Set every group's learning rate, times its `lr_scale` if it has one; returns the unscaled rate."""
        lr = self.at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

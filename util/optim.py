"""The optimisers of the three jobs.

The order of the parameter groups is that of published checkpoints, which store the optimiser's state by position: it
must not change.
"""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from util.distributed import dist
from util.lars import LARS


def actual_lr(lr: float | None, blr: float, batch_size: int, accum_iter: int) -> float:
    """Return the learning rate of a run.

    Args:
        lr: Learning rate as given; None: that of blr, scaled by the effective batch size.
        blr: Learning rate per 256 images.
        batch_size: Images per batch and rank.
        accum_iter: Batches per update.
    """
    return scaled_lr(blr, batch_size * accum_iter * dist.world_size()) if lr is None else lr


def scaled_lr(blr: float, effective_batch: int) -> float:
    """Return the learning rate for an effective batch size, by the linear scaling rule (paper, appendix A)."""
    return blr * effective_batch / 256


def adamw(groups: list[dict], lr: float, shard: bool, **more: object) -> torch.optim.Optimizer:
    """Create an AdamW, fused except on MPS, with its state spread over the ranks if asked for.

    Args:
        groups: Parameter groups.
        lr: Learning rate.
        shard: Spread the state over the ranks, if there are several (ZeRO-1, Rajbhandari et al. 2020): each updates a
            share of the parameters and sends them to the others. Its state_dict needs dist.gather_optimizer first.
            With fp16's scaler torch's ZeRO waits for the GPU at every update.
        **more: Further arguments of AdamW.
    """
    # MPS's fused kernel ignored the flag by which updates are skipped (pytorch/pytorch#186360).
    fused = groups[0]["params"][0].device.type != "mps"
    if shard and dist.world_size() > 1:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=lr, fused=fused, **more)
    return torch.optim.AdamW(groups, lr=lr, fused=fused, **more)


def pretrain_optimizer(model: nn.Module, lr: float, weight_decay: float, shard: bool = False) -> torch.optim.Optimizer:
    """Create the optimiser of pre-training: AdamW with betas (0.9, 0.95).

    Args:
        model: The autoencoder.
        lr: Learning rate.
        weight_decay: Weight decay of all parameters except the 1-D ones; cls_token and mask_token decay too.
        shard: Spread the state over the ranks, as in `adamw`.
    """
    return adamw(param_groups_weight_decay(model, weight_decay), lr, shard, betas=(0.9, 0.95))


def finetune_optimizer(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float, shard: bool = False
) -> torch.optim.Optimizer:
    """Create the optimiser of fine-tuning: AdamW with learning rates that decay from layer to layer (BEiT's rule).

    Args:
        model: The classifier.
        lr: Learning rate of the head.
        weight_decay: Weight decay of all parameters except the 1-D ones, cls_token and pos_embed.
        layer_decay: Factor of the learning rate for each layer below the head.
        shard: Spread the state over the ranks, as in `adamw`.
    """
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    keep = ("params", "lr_scale", "weight_decay")  # published checkpoints hold nothing else of timm's
    return adamw([{name: group[name] for name in keep} for group in groups], lr, shard)


def probe_optimizer(model: nn.Module, lrs: list[float], weight_decay: float) -> torch.optim.Optimizer:
    """Create the optimiser of linear probing: LARS over the head, the only part that is trained.

    A probe with attentive pooling gets AdamW: LARS is not made for attention.

    Args:
        model: The probe (models_vit.make_linear_probe).
        lrs: Learning rate of each head; several are stored as multiples (lr_scale) of the first.
        weight_decay: Weight decay of the trained matrices.
    """
    if model.attn_pool is not None:
        return adamw(param_groups_weight_decay(model, weight_decay), lrs[0], shard=False)
    if len(lrs) == 1:
        return LARS([p for p in model.parameters() if p.requires_grad], lr=lrs[0], weight_decay=weight_decay)
    groups = [
        {"params": list(head.parameters()), "lr_scale": lr / lrs[0]}
        for head, lr in zip(model.head[1].heads, lrs, strict=True)
    ]
    return LARS(groups, lr=lrs[0], weight_decay=weight_decay)

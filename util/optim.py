"""The optimisers of the three jobs. The order of the groups is that of published checkpoints: don't change it."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from util.distributed import dist
from util.lars import LARS


def actual_lr(lr: float | None, blr: float, batch_size: int, accum_iter: int) -> float:
    """lr, or by the linear scaling rule blr * effective batch size / 256 (paper, appendix A). Prints what it took."""
    ranks = dist.world_size()
    effective = batch_size * accum_iter * ranks
    lr = blr * effective / 256 if lr is None else lr
    dist.print_rank0(
        f"effective batch size {effective} = {batch_size} x {accum_iter} x {ranks} ranks, learning rate {lr:.3g}"
    )
    return lr


def adamw(groups: list[dict], lr: float, shard: bool, **more: object) -> torch.optim.Optimizer:
    """Fused AdamW; with shard and several ranks its state is spread over them (ZeRO-1, Rajbhandari et al. 2020): each
    updates a share of the parameters and sends them to the others. dist.gather_optimizer before its state_dict. With
    fp16's scaler torch's ZeRO waits for the GPU at every update."""
    if shard and dist.world_size() > 1:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=lr, fused=True, **more)
    return torch.optim.AdamW(groups, lr=lr, fused=True, **more)


def pretrain_optimizer(model: nn.Module, lr: float, weight_decay: float, shard: bool = False) -> torch.optim.Optimizer:
    """AdamW with betas (0.9, 0.95); 1-D parameters don't decay, all others do, cls_token and mask_token too."""
    return adamw(param_groups_weight_decay(model, weight_decay), lr, shard, betas=(0.9, 0.95))


def finetune_optimizer(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float, shard: bool = False
) -> torch.optim.Optimizer:
    """AdamW with layer-wise learning rates (layer_decay per layer below the head, BEiT's rule); 1-D parameters,
    cls_token and pos_embed don't decay."""
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    keep = ("params", "lr_scale", "weight_decay")  # published checkpoints hold nothing else of timm's
    return adamw([{name: group[name] for name in keep} for group in groups], lr, shard)


def probe_optimizer(model: nn.Module, lrs: list[float], weight_decay: float) -> torch.optim.Optimizer:
    """LARS over the head, the only part of a probe that is trained; each of several heads has a rate of its own, as
    a multiple (lr_scale) of the first's. AdamW where there is an attentive pooling, which LARS is not made for."""
    if model.attn_pool is not None:
        return adamw(param_groups_weight_decay(model, weight_decay), lrs[0], shard=False)
    if len(lrs) == 1:
        return LARS([p for p in model.parameters() if p.requires_grad], lr=lrs[0], weight_decay=weight_decay)
    groups = [
        {"params": list(head.parameters()), "lr_scale": lr / lrs[0]}
        for head, lr in zip(model.head[1].heads, lrs, strict=True)
    ]
    return LARS(groups, lr=lrs[0], weight_decay=weight_decay)

"""Count the operations of a training step, for the TFLOP/s in the logs and in the benchmarks."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, mask_ratio: float | None = None) -> float:
    """Return the floating-point operations of a forward and a backward pass, for each image.

    PyTorch's counter adds up the matrix products and convolutions, which are nearly all of the work; a multiplication
    and an addition are two operations. What --grad_checkpoint computes a second time is not counted.

    Args:
        model: An autoencoder or a classifier, before `util.speed.prepare`; it is left as it is.
        mask_ratio: Share of the patches that an autoencoder masks; None: the model is a classifier.

    Raises:
        Exception: An error of any kind, where the model's code needs the tensors' values: it runs on the "meta" device.
    """
    # The counter needs shapes only. So the model is copied to "meta", where tensors have no values: deepcopy's memo is
    # filled with such tensors, in place of copies of the data.
    memo: dict[int, object] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    shadow = copy.deepcopy(model, memo).train()

    # Two images, since BatchNorm refuses to train on one.
    imgs = torch.empty(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = shadow(imgs) if mask_ratio is None else shadow(imgs, mask_ratio=mask_ratio)[0]
        output.sum().backward()
    return counter.get_total_flops() / 2

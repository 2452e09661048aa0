"""What makes a step faster and leaves its numbers alone: attention's kernel, compilation, activations kept or not."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn


def choose_attention(device: torch.device, amp: str) -> str:
    """"fused" (PyTorch's scaled_dot_product_attention) or "plain" (two matrix products and a softmax).

    Fused everywhere but in bf16 on the CPU: there it took 3.3 times as long as plain attention for 50 tokens (12 heads
    of 64), 1.5 times for 197 (16 heads of 32), forward and backward, batch 16; in fp32 1.1 and 0.4 times (medians of
    10, 2 cores of an Intel Xeon with avx512_bf16, torch 2.15.0). Kernels on CUDA: not measured.
    """
    return "plain" if device.type == "cpu" and amp == "bf16" else "fused"


def prepare(
    model: nn.Module, device: torch.device, amp: str, attention: str, compiled: bool | None, grad_checkpoint: bool
) -> None:
    """Set up a model's blocks for speed, in place; parameters and their names stay.

    attention: "auto", "fused" or "plain". compiled: every block by torch.compile; None: on CUDA only. Blocks are
    compiled one by one: they share their code, so that the whole model costs two compilations. grad_checkpoint: keep
    only the blocks' inputs for the backward pass, which computes the rest again: a third more work, far less memory.
    """
    kernel = choose_attention(device, amp) if attention == "auto" else attention
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = kernel == "fused"
    model.set_grad_checkpointing(grad_checkpoint)
    if device.type == "cuda" if compiled is None else compiled:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)

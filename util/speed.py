"""What makes a step faster or smaller and leaves its numbers alone: attention's kernel, compilation, checkpointing."""

import ctypes
import sys
from functools import cache

import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from util.distributed import dist
from util.errors import UserError

ATTENTION = ("auto", "fused", "plain")


class TensorDropPath(DropPath):
    """timm's stochastic depth, with its rate in a tensor.

    A rate that is a number is a constant of the compiled code: every block, whose rate is its own, would be compiled
    anew.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole images at random: x [N, L, D] -> [N, L, D]."""
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(self.keep_prob).div_(self.keep_prob)


def choose_attention(device: torch.device, amp: str) -> str:
    """Return the faster implementation of attention.

    "fused" is PyTorch's scaled_dot_product_attention, "plain" timm's matrix products and softmax. Fused is faster
    everywhere but in bf16 on the CPU (BENCHMARKS.md).
    """
    return "plain" if device.type == "cpu" and amp == "bf16" else "fused"


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees for the next one, for training on the CPU.

    By default glibc maps every large tensor anew and the kernel clears its pages, which took 13 % of a ViT-B step in
    bf16. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


@cache
def compile_problem(device: torch.device) -> str:
    """Return why torch.compile does not work on this device, or "": a small function is compiled to find out.

    It needs a compiler (g++ on a CPU, a C compiler for Triton on CUDA), Python's headers, and on CUDA a GPU of compute
    capability 7.0 or newer.
    """
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # Dynamo, Inductor, Triton and the compiler they start each raise their own
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return ""


def compiles(device: torch.device, wanted: bool | None) -> bool:
    """Decide whether to compile: as wanted; by default (None) on CUDA, where it works.

    Raises:
        UserError: Compilation is wanted and does not work on this device.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    problem = compile_problem(device)
    if problem and wanted:
        raise UserError(f"--compile: torch.compile does not work here: {problem}. Install what it lacks or omit it")
    if problem:
        dist.print_rank0(f"notice: the blocks are not compiled, since torch.compile does not work here: {problem}")
    return not problem


def prepare(
    model: nn.Module, device: torch.device, amp: str, attention: str, compiled: bool | None, grad_checkpoint: bool
) -> None:
    """Set up a model's blocks for speed, in place; parameters and their names stay.

    Blocks are compiled one by one: they share their code, so that the whole model costs two or three compilations.

    Args:
        model: An autoencoder or a classifier, on its device.
        device: Where it is trained.
        amp: "bf16", "fp16" or "off".
        attention: One of ATTENTION; "auto" takes the faster one.
        compiled: Whether torch.compile compiles every block; None: on CUDA, where it works.
        grad_checkpoint: Keep only the blocks' inputs for the backward pass, which computes the rest again: a third
            more work, far less memory.

    Raises:
        UserError: Compilation is wanted and does not work on this device.
    """
    if device.type == "cpu":
        keep_freed_memory()
    kernel = choose_attention(device, amp) if attention == "auto" else attention
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = kernel == "fused"
        elif isinstance(module, DropPath):
            # Not a buffer: checkpoints don't hold it.
            module.keep_prob = torch.tensor(1 - module.drop_prob, device=device)
            module.__class__ = TensorDropPath
    model.set_grad_checkpointing(grad_checkpoint)
    if compiles(device, compiled):
        # Blocks are small graphs: DDP's cuts, made for whole models, would only halve them.
        torch._dynamo.config.optimize_ddp = False
        # Versions of one code: encoder's and decoder's blocks, frozen and trained ones, evaluation, a last batch.
        torch._dynamo.config.recompile_limit = 32
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)

"""Speed and memory of a training step: attention's implementation, compilation, activation checkpointing.

None of them changes what is computed, except for rounding.
"""

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
    """timm's stochastic depth, with its rate in a tensor, `keep_prob`; `prepare` turns a DropPath into one.

    A rate that is a number would be a constant of the compiled code, and every block, whose rate is its own, would be
    compiled anew.
    """

    def forward(self, x: Tensor) -> Tensor:
        """In training, set x [N, L, D] to 0 for random images, and divide the others by the probability to stay."""
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(self.keep_prob).div_(self.keep_prob)


def choose_attention(device: torch.device, amp: str) -> str:
    """Return the faster implementation of attention.

    "fused" is PyTorch's scaled_dot_product_attention, "plain" timm's matrix products and softmax. Plain is taken in
    bf16 on the CPU only; in fp32 there, fused is a tenth slower at 50 tokens, far faster at 197 (BENCHMARKS.md).
    """
    return "plain" if device.type == "cpu" and amp == "bf16" else "fused"


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees, for the next step; for training on the CPU.

    By default glibc maps new memory for every large tensor, and the kernel clears its pages. Keeping the memory made a
    ViT-B step in bf16 13 % faster (BENCHMARKS.md). With another C library the function does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


@cache
def compile_problem(device: torch.device) -> str:
    """Return why torch.compile does not work on this device, or "" if it does, by compiling a small function.

    torch.compile needs a compiler (g++ on a CPU, a C compiler for Triton on CUDA), Python's headers, and on CUDA a GPU
    of compute capability 7.0 or newer.
    """
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # Dynamo, Inductor, Triton and the compiler they start each raise their own
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return ""


def compiles(device: torch.device, wanted: bool | None) -> bool:
    """Decide whether to compile the blocks, and print a notice if compilation is the default but does not work.

    Args:
        device: Where the model is trained.
        wanted: As --compile: compile or not; None: on CUDA, if it works there.

    Raises:
        UserError: Compilation is asked for and does not work on this device.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    problem = compile_problem(device)
    if problem and wanted:
        raise UserError(
            f"--compile: torch.compile does not work here: {problem}. Install what is missing, or omit --compile"
        )
    if problem:
        dist.print_rank0(f"notice: the blocks are not compiled, since torch.compile does not work here: {problem}")
    return not problem


def prepare(
    model: nn.Module, device: torch.device, amp: str, attention: str, compiled: bool | None, grad_checkpoint: bool
) -> None:
    """Set up a model's blocks for speed, in place; parameters and their names stay.

    Blocks are compiled one by one: they share their code, so that the whole model takes two or three compilations.
    Settings of the whole process change, too: Dynamo's where blocks are compiled, the C library's on the CPU.

    Args:
        model: An autoencoder or a classifier, on its device.
        device: Where it is trained.
        amp: "bf16", "fp16" or "off".
        attention: One of ATTENTION; "auto" takes the faster one.
        compiled: Whether torch.compile compiles every block; None: on CUDA, if it works there.
        grad_checkpoint: Activation checkpointing: keep only the blocks' inputs for the backward pass, which computes
            the rest again (a third more work, far less memory).

    Raises:
        UserError: Compilation is asked for and does not work on this device.
    """
    if device.type == "cpu":
        keep_freed_memory()

    # Set the attention's implementation, and turn the rates of stochastic depth into tensors. Changing the class of
    # timm's modules keeps their names.
    implementation = choose_attention(device, amp) if attention == "auto" else attention
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = implementation == "fused"
        elif isinstance(module, DropPath):
            # Not a buffer, since checkpoints do not hold it.
            module.keep_prob = torch.tensor(1 - module.drop_prob, device=device)
            module.__class__ = TensorDropPath
    model.set_grad_checkpointing(grad_checkpoint)

    if compiles(device, compiled):
        # Dynamo splits graphs at DDP's buckets, which helps whole models but would only cut these small graphs in two.
        torch._dynamo.config.optimize_ddp = False
        # All blocks count as versions of one code, of which there are more than the default limit of 8: encoder and
        # decoder, frozen and trained blocks, evaluation, an epoch's smaller last batch.
        torch._dynamo.config.recompile_limit = 32
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)

"""What makes a step faster and leaves its numbers alone: attention's kernel, compilation, activations kept or not, and
memory that stays with the process."""

import ctypes
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = ("auto", "fused", "plain", "blocked")
# What torch.compile wants, by the kind of device.
COMPILERS = {
    "cpu": "a C++ compiler (g++, or the one that CXX names), a Python that torch.compile knows and its headers "
           "(Debian's python3-dev)",
    "cuda": "a C compiler (gcc, clang, or the one that CC names), a Python that torch.compile knows, its headers "
            "(Debian's python3-dev) and a GPU of compute capability 7.0 or newer",
}  # fmt: skip
SCORES = 2_500_000  # at a time, in blocked attention: 5 MB in bf16, of 2 to 10 the fastest


class BlockedAttention(Attention):
    """timm's attention, a few images at a time, whose scores then stay in the processor's cache.

    By hand since PyTorch's fused kernel is slow in bf16 on CPUs (see choose_attention). For the masked autoencoder's
    and the classifiers' blocks: without gate and norms of its own, and without mask.
    """

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [N, L, D] -> [N, L, D]."""
        N, L, _ = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).contiguous()
        pieces = []
        for part in qkv.split(max(1, SCORES // (self.num_heads * L * L)), dim=1):  # [3, n, heads, L, d]
            q, k, v = part.unbind(0)
            pieces.append(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v)
        return self.proj(torch.cat(pieces).transpose(1, 2).flatten(2))


class LateBias(nn.Linear):
    """A linear layer whose bias is an operation of its own, which the compiler joins with what follows: on the CPU
    bf16 products that start from the bias take 2 to 9 % longer."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., out]."""
        x = F.linear(x, self.weight)
        return x if self.bias is None else x + self.bias.to(x.dtype)


@torch.library.custom_op("mae::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """PyTorch's kernel, which the compiler takes as it is: of bf16 on the CPU its own takes nearly twice as long."""
    return F.gelu(x)


@torch.library.custom_op("mae::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad.contiguous(), x)


gelu.register_fake(torch.empty_like)
_gelu_backward.register_fake(lambda grad, x: torch.empty_like(x))
gelu.register_autograd(
    lambda ctx, grad: _gelu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class WholeGELU(nn.GELU):
    """GELU by the kernel above."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> [...]."""
        return gelu(x)


class SharedDropPath(DropPath):
    """timm's, with the share that stays in a tensor: as a number it would be a constant of the compiled code, and every
    block, whose rate is its own, a compilation more, of which PyTorch allows eight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, D] -> [N, L, D]."""
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(self.stay).div_(self.stay)


def choose_attention(device: torch.device, amp: str) -> str:
    """"fused" (PyTorch's scaled_dot_product_attention), "blocked" or "plain" (timm's products and softmax).

    Fused everywhere but in bf16 on the CPU. There, forward and backward for 16 images took on 2 cores of an AMD EPYC
    (Zen 4, torch 2.14.1, medians of 15 to 20): 18.7 ms fused, 4.1 plain for 50 tokens of 12 heads of 64; 71 fused, 32
    plain, 29 blocked for 197 tokens of 16 heads of 32. Kernels on CUDA: not measured.
    """
    return "blocked" if device.type == "cpu" and amp == "bf16" else "fused"


def keep_memory() -> None:
    """For training on the CPU: let the C library keep the memory that a step frees for the next one.

    Otherwise glibc maps every large tensor anew and the kernel clears its pages, which took 13 % of a ViT-B step in
    bf16. What was once used stays with the process. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def can_compile(kind: str) -> bool:
    """Whether that is there; of other kinds nothing is known: True."""
    if kind not in COMPILERS:
        return True
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton reads it
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    if not headers.exists() or not torch._dynamo.is_dynamo_supported():
        return False
    if kind == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # Triton takes CC as one word
        return any(map(shutil.which, names)) and torch.cuda.get_device_capability() >= (7, 0)
    return shutil.which((os.environ.get("CXX", "").split() or ["g++"])[0]) is not None


def compiles(device: torch.device, wanted: bool | None) -> bool:
    """What --compile and --no_compile mean; neither (None): on CUDA only, where it is possible."""
    return device.type == "cuda" and can_compile("cuda") if wanted is None else wanted


def prepare(
    model: nn.Module, device: torch.device, amp: str, attention: str, compiled: bool | None, grad_checkpoint: bool
) -> None:
    """Set up a model's blocks for speed, in place; parameters and their names stay.

    attention: of ATTENTION. compiled: every block by torch.compile; None: on CUDA only. Blocks are compiled one by
    one: they share their code, so that the whole model costs two or three compilations. grad_checkpoint: keep only
    the blocks' inputs for the backward pass, which computes the rest again: a third more work, far less memory.
    """
    kernel = choose_attention(device, amp) if attention == "auto" else attention
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = kernel == "fused"
            module.__class__ = BlockedAttention if kernel == "blocked" else Attention
        elif isinstance(module, DropPath):
            module.stay = torch.tensor(1 - module.drop_prob, device=device)  # no buffer: checkpoints don't hold it
            module.__class__ = SharedDropPath
    model.set_grad_checkpointing(grad_checkpoint)
    if compiled is None and device.type == "cuda" and not can_compile("cuda") and os.environ.get("RANK", "0") == "0":
        print(f"notice: the blocks are not compiled, for want of {COMPILERS['cuda']}", flush=True)
    compiled = compiles(device, compiled)
    bf16_on_cpu = compiled and device.type == "cpu" and amp == "bf16"
    linear, activation = (LateBias, WholeGELU) if bf16_on_cpu else (nn.Linear, nn.GELU)
    if compiled:
        # Blocks are small graphs: DDP's cuts, made for whole models, would only halve them.
        torch._dynamo.config.optimize_ddp = False
        # Versions of one code: encoder's and decoder's blocks, frozen and trained ones, evaluation, a last batch.
        torch._dynamo.config.recompile_limit = 32
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for layer in block.modules():
            if type(layer) in (nn.Linear, LateBias):
                layer.__class__ = linear
            elif type(layer) in (nn.GELU, WholeGELU):
                layer.__class__ = activation
        if compiled:
            block.compile(dynamic=False)

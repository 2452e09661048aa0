"""Position embeddings: MAE's fixed 2-D sine-cosine table, and the resizing of a table to another grid of patches."""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Compute the fixed 2-D sine-cosine table of positions (paper, appendix A.1, after Vaswani et al.).

    The first half of the channels encodes the column, the second half the row, each as sines, then cosines, of
    pos / 10000^(i / (dim/4)). Written by hand, since timm's table encodes the row first, and in fp32.

    Args:
        dim: Width of the model, divisible by 4.
        grid_size: Rows and columns of patches, (H, W).

    Returns:
        The table [1, 1 + H*W, dim] in fp64, a row of zeros for the class token first.

    Raises:
        ValueError: dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {dim}")
    height, width = grid_size
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies  # [H*W, dim/4]
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, dim=1)  # [H*W, dim]
    return torch.cat([table.new_zeros(1, dim), table])[None]


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a table of positions to another grid, bicubically without antialias; the class token's row stays.

    Args:
        pos_embed: The table [1, 1 + h*w, D].
        old_grid: Its rows and columns of patches, (h, w).
        new_grid: Those of the result, (H, W).

    Returns:
        The table [1, 1 + H*W, D].
    """
    return resample_abs_pos_embed(
        pos_embed, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=1, antialias=False
    )

"""Which patches are masked: the paper's three ways (Table 1f, Figure 6), each as noise whose smallest values are kept.

Shapes: N images, a grid of h x w patches, L = h*w.
"""

import math
import os
import zlib

import torch
from torch import Tensor

KINDS = ("random", "block", "grid")


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of patches that stay visible under a mask ratio, by the published formula.

    It rounds down as computers calculate: 9 of 100 under a ratio of 0.9.
    """
    return int(num_patches * (1 - mask_ratio))


def ratio_problems(mask_ratio: float, num_patches: int) -> list[str]:
    """Check that a mask ratio keeps and removes at least one patch; return a list with one message, or an empty one."""
    if 1 <= num_visible(num_patches, mask_ratio) < num_patches:
        return []
    return [f"--mask_ratio {mask_ratio} must keep and remove at least one of {num_patches} patches"]


def noise(
    kind: str, N: int, grid: tuple[int, int], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the noise by which a model chooses the patches to keep: those with the smallest values.

    Args:
        kind: "random": uniform noise. "block": large rectangles are masked first, in the order in which they are drawn.
            "grid": of every 2 x 2 patches the top left one is kept longest, then bottom right, top right, bottom left.
        N: Number of images.
        grid: Rows and columns of patches.
        device: Where the noise is drawn.
        generator: Random numbers; None: torch's default ones.

    Returns:
        The noise [N, L].
    """
    h, w = grid
    uniform = torch.rand(N, h * w, device=device, generator=generator)
    if kind == "random":
        return uniform

    # A whole number per patch sets the order, and the uniform noise below 1 breaks ties.
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    if kind == "grid":
        odd_row, odd_column = rows[:, None] % 2, columns % 2
        # [h, w]: 0, 2 over 3, 1. Computed, since copying a table to the GPU would wait for it.
        rank = 2 * (odd_row ^ odd_column) + odd_row
        return rank.flatten() + uniform
    if kind == "block":
        # Patches of the first rectangle, 0, get the largest noise and go first; uncovered ones, 24, the smallest.
        return uniform - _first_block(N, rows, columns, uniform.dtype, generator)
    raise ValueError(f"unknown kind of masks: {kind}")


def _first_block(
    N: int, rows: Tensor, columns: Tensor, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Return for each patch the number of the first of 24 random rectangles that covers it; 24 where none does.

    A rectangle's area is 10 to 30 % of the image's, its aspect ratio log-uniform in 0.3 to 1/0.3.

    Args:
        N: Number of images.
        rows: Numbers of the rows of patches [h].
        columns: Numbers of the columns of patches [w].
        dtype: Type of the result.
        generator: Random numbers; None: torch's default ones.

    Returns:
        The numbers [N, L].
    """
    # Draw each rectangle's area, aspect ratio and place, in patches.
    count, h, w, device = 24, len(rows), len(columns), rows.device
    draws = torch.rand(4, N, count, device=device, generator=generator)
    area = (0.1 + 0.2 * draws[0]) * h * w
    aspect = torch.exp((2 * draws[1] - 1) * math.log(1 / 0.3))
    height = (area / aspect).sqrt().round().clamp(1, h)
    width = (area * aspect).sqrt().round().clamp(1, w)
    top = (draws[2] * (h - height + 1)).floor()  # [N, count]
    left = (draws[3] * (w - width + 1)).floor()

    # Find the patches inside, and for each the smallest number.
    in_rows = (rows >= top[..., None]) & (rows < (top + height)[..., None])  # [N, count, h]
    in_columns = (columns >= left[..., None]) & (columns < (left + width)[..., None])  # [N, count, w]
    covered = in_rows[..., :, None] & in_columns[..., None, :]  # [N, count, h, w]
    number = torch.arange(count, device=device, dtype=dtype)[:, None, None]
    return torch.where(covered, number, float(count)).amin(dim=1).flatten(1)


def fixed_noise(kind: str, names: list[str], seed: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Draw noise that follows from the seed and each image's name, whatever else is in the batch.

    Args:
        kind: One of KINDS, as in `noise`.
        names: Names of the N images, as the system gives them: their bytes count, in whatever encoding.
        seed: Seed of the masks.
        grid: Rows and columns of patches.
        device: Where the noise is put.

    Returns:
        The noise [N, L].
    """
    rows = []
    for name in names:
        generator = torch.Generator().manual_seed(zlib.crc32(os.fsencode(f"{seed} {name}")))  # a seed of 32 bits
        rows.append(noise(kind, 1, grid, torch.device("cpu"), generator))  # drawn on the CPU: the same for every device
    return torch.cat(rows).to(device)

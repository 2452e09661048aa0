"""Which patches are masked: the paper's three ways (Table 1f, Figure 6), each as noise whose smallest values are kept.

Shapes: N images, a grid of h x w patches, L = h*w.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("random", "block", "grid")


@dataclass(frozen=True)
class MaskSettings:
    """Which masks a model is looked at under.

    Attributes:
        ratio: Share of the patches that is removed.
        sampling: One of KINDS.
        seed: Fixes the masks, together with the images' names.
    """

    ratio: float
    sampling: str
    seed: int


def noise(
    kind: str, N: int, grid: tuple[int, int], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """[N, L]. random: uniform. block: what lies in large rectangles is masked first, the earliest drawn before the
    next. grid: of every 2 x 2 patches the first is kept longest, then the one across, then the others."""
    h, w = grid
    uniform = torch.rand(N, h * w, device=device, generator=generator)
    if kind == "random":
        return uniform
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    if kind == "grid":
        odd_row, odd_column = rows[:, None] % 2, columns % 2
        rank = 2 * (odd_row ^ odd_column) + odd_row  # [h, w]: 0, 2 over 3, 1; a table would be a wait for the GPU
        return rank.flatten() + uniform
    first = _first_block(N, h, w, rows, columns, uniform, generator)
    return -first + uniform


def _first_block(
    N: int, h: int, w: int, rows: Tensor, columns: Tensor, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """[N, L]: the number of the first of 24 rectangles that covers a patch; 24 where none does. Their areas are 10 to
    30 % of the image's, their aspects log-uniform in 0.3 to 1/0.3."""
    count = 24
    draws = torch.rand(4, N, count, device=like.device, generator=generator)
    area = (0.1 + 0.2 * draws[0]) * h * w
    aspect = torch.exp((2 * draws[1] - 1) * math.log(1 / 0.3))
    height = (area / aspect).sqrt().round().clamp(1, h)
    width = (area * aspect).sqrt().round().clamp(1, w)
    top, left = (draws[2] * (h - height + 1)).floor(), (draws[3] * (w - width + 1)).floor()  # [N, count]
    in_rows = (rows >= top[..., None]) & (rows < (top + height)[..., None])  # [N, count, h]
    in_columns = (columns >= left[..., None]) & (columns < (left + width)[..., None])
    covered = in_rows[..., :, None] & in_columns[..., None, :]  # [N, count, h, w]
    number = torch.arange(count, device=like.device, dtype=like.dtype)[:, None, None]
    return torch.where(covered, number, float(count)).amin(dim=1).flatten(1)


def fixed_noise(kind: str, names: list[str], seed: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """[N, L] that follows from the seed and each image's name, whatever else is in the batch."""
    rows = []
    for name in names:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it takes 32 bits
        rows.append(noise(kind, 1, grid, torch.device("cpu"), generator))
    return torch.cat(rows).to(device)

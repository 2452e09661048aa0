"""Random erasing: drawn when an image is loaded, and done when its batch is normalised on the device.

Images travel to the device as bytes. What erasing puts into them are values of normalised images, which no byte holds:
they travel beside the images, for the quarter of them or so that is erased.
"""

import math
from typing import NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class Erasure(NamedTuple):
    """Values that random erasing puts into a part of a normalised image.

    Attributes:
        top: First row of the part.
        left: Its first column.
        values: The values [C, h, w]; NaN where the image stays as it is.
    """

    top: int
    left: int
    values: Tensor


class ErasableImage(NamedTuple):
    """An image [C, H, W] that is not normalised yet, and what is to be erased of it then."""

    img: Tensor
    erasure: Erasure | None


def draw_erasure(erase: RandomErasing, shape: torch.Size) -> Erasure | None:
    """Draw what timm's random erasing does to a normalised image of this shape [C, H, W]; None: nothing."""
    # Erase an empty image, and cut out the part that is not empty any more.
    canvas = erase(torch.full(shape, math.nan))
    erased = ~canvas[0].isnan()
    rows, columns = (erased.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    part = canvas[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Erasure(rows[0], columns[0], part)


def pack_erasures(erasures: list[Erasure | None]) -> tuple[Tensor, Tensor]:
    """Pack a batch's erasures into two tensors, since each tensor that a loader process sends takes an open file.

    Args:
        erasures: What is erased of each image; None: nothing.

    Returns:
        For each of E images of which something is erased (image, top, left, h, w) [E, 5]; and all values [V].
    """
    present = [(number, erasure) for number, erasure in enumerate(erasures) if erasure]
    places = [(number, erasure.top, erasure.left, *erasure.values.shape[1:]) for number, erasure in present]
    values = [erasure.values.flatten() for _, erasure in present]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 5), torch.cat([torch.empty(0), *values])


def apply_erasures(imgs: Tensor, places: Tensor, values: Tensor) -> None:
    """Erase parts of normalised images, in place.

    Args:
        imgs: The images [N, C, H, W].
        places: Of pack_erasures, on the CPU.
        values: Of pack_erasures, on the images' device.
    """
    start = 0
    for number, top, left, h, w in places.tolist():
        part = imgs[number, :, top : top + h, left : left + w]
        new = values[start : start + part.numel()].view(part.shape)
        part.copy_(torch.where(new.isnan(), part, new))
        start += part.numel()

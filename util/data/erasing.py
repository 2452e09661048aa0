"""Random erasing, which is drawn when an image is loaded and applied when its batch is normalised on the device.

Images are sent to the device as bytes. Erasing fills boxes with values of normalised images, which bytes can't hold:
these values are sent separately, for those images only that are erased (by default a quarter of them). timm can erase a
whole batch on the device, but draws from the training process's random stream; here an image's boxes follow from seed,
epoch and image alone, whichever process loads it.
"""

from typing import NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class Box(NamedTuple):
    """A part of a normalised image, and the values that erasing puts there.

    Attributes:
        top: Its first row.
        left: Its first column.
        values: The values [C, h, w].
    """

    top: int
    left: int
    values: Tensor


class ErasableImage(NamedTuple):
    """An image [C, H, W] before normalisation, and the boxes to erase in it after normalisation, in order."""

    img: Tensor
    boxes: list[Box]


class _Recorder:
    """Stand-in for a normalised image, which notes what timm's random erasing writes into it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.boxes = shape, []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        values = values.expand(self.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        self.boxes.append(Box(rows.start, columns.start, values))


def draw_boxes(erase: RandomErasing, shape: torch.Size) -> list[Box]:
    """Draw the boxes that timm's random erasing puts into a normalised image of this shape [C, H, W], mostly none."""
    recorder = _Recorder(shape)
    erase(recorder)
    return recorder.boxes


def pack_boxes(boxes: list[list[Box]]) -> tuple[Tensor, Tensor]:
    """Pack a batch's boxes into two tensors, since each tensor that a loader process sends takes an open file.

    Args:
        boxes: The boxes of each image.

    Returns:
        A row (image, top, left, h, w) for each of the B boxes, [B, 5], and the values of all boxes in one vector [V].
    """
    numbered = [(number, box) for number, own in enumerate(boxes) for box in own]
    places = [(number, box.top, box.left, *box.values.shape[1:]) for number, box in numbered]
    values = [box.values.flatten() for _, box in numbered]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 5), torch.cat([torch.empty(0), *values])


def erase_boxes(imgs: Tensor, places: Tensor, values: Tensor) -> None:
    """Erase boxes of normalised images, in place.

    Args:
        imgs: The images [N, C, H, W].
        places: First result of `pack_boxes` [B, 5], on the CPU.
        values: Second result of `pack_boxes` [V], on the images' device.
    """
    start = 0
    for number, top, left, h, w in places.tolist():
        box = imgs[number, :, top : top + h, left : left + w]
        box.copy_(values[start : start + box.numel()].view(box.shape))
        start += box.numel()

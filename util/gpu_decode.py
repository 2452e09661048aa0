"""--gpu_decode: loader processes only read the files and draw the crops; JPEGs are decoded on the GPU, by the batch.

Through torchvision's binding of nvJPEG. Its pixels are not libjpeg's (another transform, another interpolation of the
colours), so it is off by default. What can't be decoded is replaced and named, but doesn't count for --max_bad_images.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util.augment import Crop, CropPlan
from util.errors import LocalError
from util.images import BadImage, decode, jpeg_size

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a later torchvision: 0.29 announces that they will go
    decode_jpeg = None


class Undecoded(NamedTuple):
    """A plain JPEG, with what to cut out of it."""

    path: str
    data: Tensor  # its bytes
    plan: CropPlan


def read(path: str, exif: bool = False) -> tuple[str, bytes, tuple[int, int]] | np.ndarray:
    """A plain JPEG's path, bytes and size; of everything else the pixels. Raises BadImage."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    size = jpeg_size(data, exif)
    return (path, data, size) if size else decode(path, data, exif)


class LaterCrop:
    """The transform of what `read` gives: Undecoded, or where there are pixels already [3, size, size] of 8 bits."""

    def __init__(self, crop: Crop) -> None:
        self.crop = crop

    def __call__(self, image: tuple[str, bytes, tuple[int, int]] | np.ndarray) -> Undecoded | Tensor:
        if isinstance(image, np.ndarray):
            return self.crop(image)
        path, data, size = image
        return Undecoded(path, torch.frombuffer(bytearray(data), dtype=torch.uint8), self.crop.plan(*size))


def collate(samples: Sequence[tuple[Undecoded | Tensor, int]]) -> tuple[list[Undecoded | Tensor], Tensor]:
    """Pictures stay a list; classes [N]."""
    return [picture for picture, _ in samples], torch.tensor([target for _, target in samples])


def crops(pictures: Sequence[Undecoded | Tensor], size: tuple[int, int], device: torch.device) -> Tensor:
    """Decode, crop, resize, flip: [N, 3, *size] of 8 bits on the device.

    A picture that cannot be decoded is named on stderr, and another of the batch takes its place; LocalError is raised
    where there is none.
    """
    coded = [number for number, picture in enumerate(pictures) if isinstance(picture, Undecoded)]
    pixels = dict(zip(coded, _decode([pictures[number] for number in coded], device), strict=True))
    out: list[Tensor | None] = []
    for number, picture in enumerate(pictures):
        if isinstance(picture, Tensor):
            out.append(picture.to(device, non_blocking=True))
        elif pixels[number] is None:
            out.append(None)
        else:
            top, left, h, w, flip = picture.plan
            crop = pixels[number][None, :, top : top + h, left : left + w].float()
            crop = F.interpolate(crop, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()[0]
            out.append(crop.flip(2) if flip else crop)
    good = [crop for crop in out if crop is not None]
    if not good:
        raise LocalError("not one picture of a batch can be decoded: is the disk all right?")
    return torch.stack([good[number % len(good)] if crop is None else crop for number, crop in enumerate(out)])


def _decode(pictures: list[Undecoded], device: torch.device) -> list[Tensor | None]:
    """[3, H, W] of 8 bits each; None for one that can't be decoded."""
    try:
        return decode_jpeg([picture.data for picture in pictures], ImageReadMode.RGB, device) if pictures else []
    except RuntimeError:  # one of them, it doesn't say which
        return [_decode_alone(picture, device) for picture in pictures]


def _decode_alone(picture: Undecoded, device: torch.device) -> Tensor | None:
    try:
        pixels = decode(picture.path, picture.data.numpy().tobytes(), False)
        return torch.from_numpy(pixels).permute(2, 0, 1).to(device)
    except BadImage as error:
        print(f"bad image, another takes its place: {error}", file=sys.stderr, flush=True)
        return None

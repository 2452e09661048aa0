"""--gpu_decode: loader processes only read the files and draw the crops; JPEGs are decoded on the GPU, by the batch.

Through torchvision's binding of nvJPEG. Its pixels are not libjpeg's (another transform, another interpolation of the
colours), so it is off by default. What can't be decoded is replaced and named, but doesn't count for --max_bad_images.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

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
    data: bytes
    plan: CropPlan


class Batch(NamedTuple):
    """Pictures as the loader sends them. Their data are one tensor: each costs a file descriptor on its way."""

    paths: list[str]
    plans: list[CropPlan | None]  # None: decoded and cut already
    sizes: list[int]  # in bytes, of the JPEGs
    data: Tensor  # their bytes, one after the other
    pixels: Tensor  # [M, 3, *size] of 8 bits, the others


def read(path: str, exif: bool = False) -> tuple[str, bytes, tuple[int, int]] | np.ndarray:
    """A plain JPEG's path, bytes and size; of everything else the pixels. Raises BadImage."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    size = jpeg_size(data, exif)
    return (path, data, size) if size else decode(path, data, exif)


class LaterCrop:
    """The transform of what `read` gives: Undecoded, or where there are pixels already [3, *size] of 8 bits."""

    def __init__(self, crop: Crop) -> None:
        self.crop = crop

    def __call__(self, image: tuple[str, bytes, tuple[int, int]] | np.ndarray) -> Undecoded | Tensor:
        if isinstance(image, np.ndarray):
            return self.crop(image)
        path, data, size = image
        return Undecoded(path, data, self.crop.plan(*size))


def collate(samples: Sequence[tuple[Undecoded | Tensor, int]]) -> tuple[Batch, Tensor]:
    """A batch, and classes [N]."""
    coded = [picture for picture, _ in samples if isinstance(picture, Undecoded)]
    pixels = [picture for picture, _ in samples if isinstance(picture, Tensor)]
    batch = Batch(
        [picture.path for picture in coded],
        [picture.plan if isinstance(picture, Undecoded) else None for picture, _ in samples],
        [len(picture.data) for picture in coded],
        torch.from_numpy(np.frombuffer(b"".join(picture.data for picture in coded), np.uint8).copy()),
        torch.stack(pixels) if pixels else torch.empty(0),
    )
    if get_worker_info():  # or it would be done on the way, in a thread whose errors (a full /dev/shm) lose the batch
        batch.data.share_memory_(), batch.pixels.share_memory_()
    return batch, torch.tensor([target for _, target in samples])


def crops(batch: Batch, size: tuple[int, int], device: torch.device) -> Tensor:
    """Decode, crop, resize, flip: [N, 3, *size] of 8 bits on the device.

    A picture that cannot be decoded is named on stderr, and another of the batch takes its place; LocalError is raised
    where there is none.
    """
    if device.type != "cuda":
        return _crops(batch, size, device)
    # nvJPEG writes without waiting for what is queued (pytorch/vision#9606): memory that a step frees and still reads
    # must not come to it. So it has a stream, and with it memory, of its own, of which nothing is in use here.
    side = _side_stream(device)
    side.synchronize()
    with torch.cuda.stream(side):
        out = _crops(batch, size, device)
    main = torch.cuda.current_stream(device)
    main.wait_stream(side)
    out.record_stream(main)
    return out


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _crops(batch: Batch, size: tuple[int, int], device: torch.device) -> Tensor:
    decoded, ready = iter(_decode(batch, device)), iter(batch.pixels.to(device, non_blocking=True))
    out = [next(ready) if plan is None else _cut(next(decoded), plan, size, device) for plan in batch.plans]
    good = [crop for crop in out if crop is not None]
    if not good:
        raise LocalError("not one picture of a batch can be decoded: is the disk all right?")
    return torch.stack([good[number % len(good)] if crop is None else crop for number, crop in enumerate(out)])


def _cut(pixels: Tensor | None, plan: CropPlan, size: tuple[int, int], device: torch.device) -> Tensor | None:
    if pixels is None:
        return None
    top, left, h, w, flip = plan
    if max(h / size[0], w / size[1]) > 40:  # CUDA's antialiasing ends at 47
        pixels = pixels.cpu()
    crop = pixels[None, :, top : top + h, left : left + w].float()
    crop = F.interpolate(crop, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()[0].to(device)
    return crop.flip(2) if flip else crop


def _decode(batch: Batch, device: torch.device) -> list[Tensor | None]:
    """[3, H, W] of 8 bits each; None for one that can't be decoded."""
    coded = list(batch.data.split(batch.sizes))
    try:
        return decode_jpeg(coded, ImageReadMode.RGB, device) if coded else []
    except RuntimeError as error:  # one of them, it doesn't say which
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        alone = [_decode_alone(path, data, device) for path, data in zip(batch.paths, coded, strict=True)]
        if all(pixels is not None for pixels in alone):
            _notice(str(error).splitlines()[0])
        return alone


def _decode_alone(path: str, data: Tensor, device: torch.device) -> Tensor | None:
    try:
        pixels = decode(path, data.numpy().tobytes(), False)
        return torch.from_numpy(pixels).permute(2, 0, 1).to(device)
    except BadImage as error:
        print(f"bad image, another takes its place: {error}", file=sys.stderr, flush=True)
        return None


@cache
def _notice(reason: str) -> None:
    """Once: a run that decodes like this all the time is slow."""
    print(f"notice: nvJPEG refused a batch, which was decoded on the CPU: {reason}", file=sys.stderr, flush=True)

"""From a picture's pixels to the model's input: our crops in 8 bits, timm's augmentations."""

import math
import random

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from util.data.images import Pixels

LOG_ASPECT = math.log(4 / 3)


def _posterize(img: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """timm's, and black where RandAugment's strongest draws keep 0 bits: so were older Pillows, Pillow 13 refuses."""
    if bits_to_keep < 1:
        return img.point(lambda _: 0)
    return auto_augment.posterize(img, bits_to_keep)


def _replace_posterize(transform: transforms.Compose) -> None:
    """Put _posterize in place of timm's in the augmentation policy of this transform alone."""
    for step in transform.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for op in (op for policy in policies for op in policy):
            if getattr(op, "aug_fn", None) is auto_augment.posterize:
                op.aug_fn = _posterize


def random_box(
    height: int, width: int, scale: tuple[float, float], one_draw: bool = False
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, in pixels: area uniform in scale (a share of the image's), aspect
    log-uniform in 3/4 to 4/3, position uniform.

    As torchvision's RandomResizedCrop, which draws again until the box fits, and after 10 draws takes the middle; by
    hand, since its draws are tensors, which takes 0.1 ms, and probing's crop is none of its: with one_draw the box is
    clipped to the image instead, so that wide crops of narrow images stay in.
    """
    for _ in range(1 if one_draw else 10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(-LOG_ASPECT, LOG_ASPECT))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if one_draw:
            h, w = max(1, min(height, h)), max(1, min(width, w))
        if 0 < h <= height and 0 < w <= width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def to_size(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W, C] of 8 bits or float32 to [C, *size] of the same: bicubic, antialiased, within a level of Pillow's."""
    return F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]


class Crop:
    """Pre-training's augmentation (random crop, flip), with one_draw linear probing's: an array [H, W, C] to a tensor
    [C, *size], both of 8 bits or both float32. The crop alone is resized."""

    def __init__(self, size: int | tuple[int, int], scale: tuple[float, float], one_draw: bool = False) -> None:
        """size: (H, W), or one for both; scale: bounds of the crop's share of the image's area."""
        self.size, self.scale, self.one_draw = to_2tuple(size), scale, one_draw

    def __call__(self, pixels: np.ndarray) -> Tensor:
        top, left, h, w = random_box(*pixels.shape[:2], self.scale, self.one_draw)
        flip = random.random() < 0.5
        img = to_size(pixels[top : top + h, left : left + w], self.size)
        return img.flip(2) if flip else img


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """224/256, above 224 pixels 1 (no margin)."""
    return 224 / 256 if max(to_2tuple(size)) <= 224 else 1.0


class CentreCrop:
    """Evaluation's: resized, bicubic, so that size / crop_pct is just covered, then the middle; arrays to tensors as
    above."""

    def __init__(self, size: int | tuple[int, int], crop_pct: float | None = None) -> None:
        size = to_2tuple(size)
        pct = crop_pct or default_crop_pct(size)
        self.size, self.cover = list(size), (int(size[0] / pct), int(size[1] / pct))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        (height, width), (h, w) = pixels.shape[:2], self.cover
        size = (h, width * h // height) if h * width >= w * height else (height * w // width, w)
        return center_crop(to_size(pixels, size), self.size)


class FinetuneTransform:
    """Fine-tuning's: crop, flip, RandAugment or colour jitter, random erasing, as timm does them; from arrays [H, W, C]
    to normalised tensors [C, *size]. timm's augmentations are Pillow's, whose pictures they work on: 8 bits of one or
    three channels. Other arrays are cropped, flipped and erased alone."""

    normalised = True

    def __init__(
        self,
        input_size: int | tuple[int, int],
        crop_scale: tuple[float, float],
        color_jitter: float | None,
        aa: str | None,
        reprob: float,
        remode: str,
        recount: int,
        pixels: Pixels = Pixels(),  # noqa: B008 (it never changes)
    ) -> None:
        self.pictures = pixels.channels in (1, 3)
        self.crop, self.normalise = Crop(input_size, crop_scale), transforms.Normalize(pixels.mean, pixels.std)
        self.erase = RandomErasing(reprob, mode=remode, max_count=recount, device="cpu")
        self.steps = create_transform(
            to_2tuple(input_size),
            is_training=True,
            scale=tuple(crop_scale),
            interpolation="bicubic",
            color_jitter=color_jitter,
            auto_augment=None if aa in (None, "", "none") else aa,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            mean=pixels.mean,
            std=pixels.std,
        )
        _replace_posterize(self.steps)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        if self.pictures and pixels.dtype == np.uint8:
            return self.steps(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
        img = self.crop(pixels)
        return self.erase(self.normalise(img / 255 if img.dtype == torch.uint8 else img))

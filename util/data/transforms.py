"""Transforms from an image's pixels to the model's input.

All crops work on tensors and keep 8 bits; fine-tuning goes on with timm's augmentations of the small image.
"""

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

from util.data.erasing import ErasableImage, draw_boxes
from util.data.images import PixelSpec

LONG = 16  # above this aspect ratio an image is a strip, of which evaluation resizes the middle only
LOG_ASPECT = math.log(4 / 3)  # random crops have an aspect ratio of 3/4 to 4/3


def _posterize(img: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """Posterize as timm does, and to black where RandAugment's strongest draws keep 0 bits.

    Older versions of Pillow did so too; Pillow 13 refuses 0 bits.
    """
    if bits_to_keep < 1:
        return img.point(lambda _: 0)
    return auto_augment.posterize(img, bits_to_keep)


def replace_posterize(transform: transforms.Compose) -> None:
    """Use _posterize instead of timm's function in the augmentation policy of this transform, and nowhere else."""
    # RandAugment and AugMix hold their operations in `ops`, AutoAugment holds lists of them in `policy`.
    for step in transform.transforms:
        for ops in (getattr(step, "ops", []), *getattr(step, "policy", [])):
            for op in ops:
                if getattr(op, "aug_fn", None) is auto_augment.posterize:
                    op.aug_fn = _posterize


def random_box(
    height: int, width: int, scale: tuple[float, float], one_draw: bool = False
) -> tuple[int, int, int, int]:
    """Draw the box of a random crop: area uniform, aspect ratio log-uniform in 3/4 to 4/3, position uniform.

    Like torchvision's RandomResizedCrop, draw again until the box fits into the image, and after 10 draws take the
    largest box of an allowed aspect ratio, from the middle. torchvision's function is not used because it draws
    tensors, which takes 0.1 ms, and because it lacks the crop of linear probing (`one_draw`), where the first box is
    clipped to the image, so that wide crops of narrow images are kept.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Bounds of the box's share of the image's area.
        one_draw: Draw once, and clip the box to the image.

    Returns:
        Top, left, height and width of the box in pixels.
    """
    for _ in range(1 if one_draw else 10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(-LOG_ASPECT, LOG_ASPECT))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if one_draw:
            h, w = max(1, min(height, h)), max(1, min(width, w))
        if 0 < h <= height and 0 < w <= width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w

    # No box fitted: take the largest one of the nearest aspect ratio, from the middle.
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def to_size(pixels: np.ndarray, size: tuple[int, int], channels_last: bool = False) -> Tensor:
    """Resize an array [H, W, C] to a tensor [C, *size] of the same type, 8 bits or float32.

    Bicubic and antialiased, first in width, then in height; 8-bit values are within one level of Pillow's where it does
    the same (newer versions begin with the height of some shapes).

    Args:
        pixels: The image.
        size: Height and width of the result in pixels.
        channels_last: Lay the result out in memory as [*size, C], the order of Pillow's images; the default is
            [C, *size]. The values are the same; those of 8 bits take two thirds of the time.
    """
    # Either way it is [1, C, H, W]. PyTorch recognises channels_last by the stride of the batch, in which they differ.
    img = torch.from_numpy(pixels)
    batch = img[None].permute(0, 3, 1, 2) if channels_last else img.permute(2, 0, 1)[None]
    return F.interpolate(batch, size, mode="bicubic", antialias=True)[0]


class Crop:
    """Random resized crop and flip: for pre-training, for fine-tuning, and for probing (one_draw).

    Takes an array [H, W, C] to a tensor [C, *size] of the same type, 8 bits or float32. Only the crop is resized, not
    the whole image.
    """

    def __init__(self, size: int | tuple[int, int], scale: tuple[float, float], one_draw: bool = False) -> None:
        """Set up the crop.

        Args:
            size: Height and width of the result in pixels, or one number for both.
            scale: Bounds of the crop's share of the image's area.
            one_draw: Draw one box and clip it to the image; otherwise draw until one fits, as in random_box.
        """
        self.size, self.scale, self.one_draw = to_2tuple(size), scale, one_draw

    def __call__(self, pixels: np.ndarray, channels_last: bool = False) -> Tensor:
        """Crop, resize and perhaps flip an image, with random numbers from Python's stream.

        Args:
            pixels: The image, [H, W, C].
            channels_last: As in `to_size`.
        """
        top, left, h, w = random_box(*pixels.shape[:2], self.scale, self.one_draw)
        flip = random.random() < 0.5
        img = to_size(pixels[top : top + h, left : left + w], self.size, channels_last)
        return img.flip(2) if flip else img


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """Return the default crop_pct of evaluation: 224/256, or 1 if a side of the result is above 224 pixels."""
    return 224 / 256 if max(to_2tuple(size)) <= 224 else 1.0


def resize_part(pixels: np.ndarray, resized: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut a part out of a resized image, of which only this part and a little around it is computed.

    Its pixels are those of to_size up to rounding: by one level of 8 bits, in white noise sometimes two.

    Args:
        pixels: Image [H, W, C], of 8 bits or float32.
        resized: Height and width of the resized image in pixels.
        corner: Top and left of the part, in pixels of the resized image.
        size: Height and width of the part in pixels.

    Returns:
        The part [C, *size], of the image's type.
    """
    boxes, skipped, scales = [], [], []
    for length, total, first, count in zip(pixels.shape[:2], resized, corner, size, strict=True):
        # A resized pixel depends on the original up to a distance of two pixels, of whichever image is the coarser.
        step = length / total
        margin = 2 * max(1, step) + 1
        before, end = max(0, int(first * step - margin)), math.ceil((first + count) * step + margin)

        # Begin where a pixel of the original and one of the resized image begin together, as nearly as possible; of
        # places that do so to a thousandth of a pixel, at the nearest.
        starts = np.arange(before, max(-1, before - math.ceil(LONG * count * step)), -1)
        offsets = starts / step
        nearest = np.argmin(np.maximum(abs(offsets - np.rint(offsets)), 1e-3))
        boxes.append(slice(int(starts[nearest]), end))
        skipped.append(first - round(offsets[nearest]))
        scales.append((1 + 1e-9) / step)  # the length is rounded down

    img = torch.from_numpy(pixels[tuple(boxes)]).permute(2, 0, 1)
    img = F.interpolate(img[None], scale_factor=scales, mode="bicubic", antialias=True)[0]
    top, left = skipped
    return img[:, top : top + size[0], left : left + size[1]]


class CentreCrop:
    """Resize and centre crop, the transform of evaluation.

    Resizes the image so that it just covers size / crop_pct, then takes the middle. Takes an array [H, W, C] to a
    tensor [C, *size] of the same type, 8 bits or float32.
    """

    def __init__(self, size: int | tuple[int, int], crop_pct: float | None = None) -> None:
        """Set up the crop.

        Args:
            size: Height and width of the result in pixels, or one number for both.
            crop_pct: Result's size as a share of the size that the resized image covers; None: default_crop_pct.
        """
        size = to_2tuple(size)
        pct = crop_pct or default_crop_pct(size)
        self.size, self.cover = list(size), (int(size[0] / pct), int(size[1] / pct))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Resize an image and cut out its middle."""
        (height, width), (h, w) = pixels.shape[:2], self.cover
        # One side gets the length that is to be covered; the other keeps the aspect ratio, and is at least as long.
        fits_height = h * width >= w * height
        size = (h, width * h // height) if fits_height else (height * w // width, w)
        if max(height, width) <= LONG * min(height, width) or max(size[0] / h, size[1] / w) <= LONG:
            return center_crop(to_size(pixels, size), self.size)

        # A long strip: whole, it would become gigabytes. The middle lies where center_crop finds it.
        corner = round((size[0] - self.size[0]) / 2), round((size[1] - self.size[1]) / 2)
        return resize_part(pixels, size, corner, tuple(self.size))


class FinetuneTransform:
    """Crop, flip, RandAugment or colour jitter, and random erasing, the augmentation of fine-tuning.

    Takes an array [H, W, C] to an image [C, *size] of the same type, 8 bits or float32, and to the boxes to erase in it
    after normalisation. Crop and flip are those of `Crop`, with the same distribution as timm's; policies, jitter and
    erasing are timm's own. Policies and jitter need Pillow's images, which hold 8 bits and one or three channels: other
    arrays are only cropped, flipped and erased.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        crop_scale: tuple[float, float],
        color_jitter: float | None,
        aa: str | None,
        reprob: float,
        remode: str,
        recount: int,
        pixels: PixelSpec = PixelSpec(),  # noqa: B008 (it never changes)
    ) -> None:
        """Set up the augmentations.

        Args:
            input_size: Height and width of the result in pixels, or one number for both.
            crop_scale: Bounds of the crop's share of the image's area.
            color_jitter: Strength of the colour jitter, which most policies of `aa` turn off; None: no jitter.
            aa: timm's name of an AutoAugment, RandAugment or AugMix policy; None, "" or "none": no policy.
            reprob: Probability of random erasing.
            remode: Fill of the erased boxes, as timm's re_mode.
            recount: Largest number of erased boxes.
            pixels: Channels of the images, and their mean, with which some operations fill what they uncover.
        """
        self.fits_pillow = pixels.channels in (1, 3)
        self.crop = Crop(input_size, crop_scale)
        self.erase = RandomErasing(reprob, mode=remode, max_count=recount, device="cpu")

        # The second of timm's three parts: what stands between its crop and flip and its conversion to a tensor.
        _, self.augment, _ = create_transform(
            to_2tuple(input_size),
            is_training=True,
            separate=True,
            interpolation="bicubic",
            color_jitter=color_jitter,
            auto_augment=None if aa in (None, "", "none") else aa,
            mean=pixels.mean,
        )
        replace_posterize(self.augment)

    def __call__(self, pixels: np.ndarray) -> ErasableImage:
        """Augment an image, and draw what is to be erased of it."""
        as_picture = self.fits_pillow and pixels.dtype == np.uint8
        img = self.crop(pixels, channels_last=as_picture)
        if as_picture:
            # Pillow's grey images have no dimension of channels.
            array = img.permute(1, 2, 0).numpy()
            picture = self.augment(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array))
            img = torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()
        return ErasableImage(img, draw_boxes(self.erase, img.shape))

"""Transforms: torchvision's and timm's, and the one crop that neither has."""

import math

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.transforms import InterpolationMode

BICUBIC = InterpolationMode.BICUBIC


def _posterize(img: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """timm's, and black where RandAugment's strongest draws keep 0 bits: so were older Pillows, Pillow 13 refuses."""
    if bits_to_keep < 1:
        return img.point(lambda _: 0)
    return auto_augment.posterize(img, bits_to_keep)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


class OneDrawResizedCrop(transforms.RandomResizedCrop):
    """Probing's crop: area and aspect are drawn once and clipped to the image; unlike torchvision's it never
    retries, so wide crops of narrow images stay in."""

    @staticmethod
    def get_params(img, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop, in pixels."""
        _, height, width = transforms.functional.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
        h = max(1, min(height, round(math.sqrt(area / aspect))))
        w = max(1, min(width, round(math.sqrt(area * aspect))))
        top = torch.randint(0, height - h + 1, ()).item()
        left = torch.randint(0, width - w + 1, ()).item()
        return top, left, h, w


def weak_transform(input_size: int, crop_scale: tuple[float, float], one_draw: bool = False) -> transforms.Compose:
    """Pre-training's augmentation (crop, flip), with one_draw linear probing's; image to tensor [3, H, W]."""
    crop = OneDrawResizedCrop if one_draw else transforms.RandomResizedCrop
    return transforms.Compose([
        crop(input_size, scale=tuple(crop_scale), interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ])  # fmt: skip


def finetune_transform(
    input_size: int,
    crop_scale: tuple[float, float],
    color_jitter: float | None,
    aa: str | None,
    reprob: float,
    remode: str,
    recount: int,
    resplit: bool,
) -> transforms.Compose:
    """timm's training transform: crop, flip, RandAugment or colour jitter, random erasing."""
    return create_transform(
        input_size,
        is_training=True,
        scale=tuple(crop_scale),
        interpolation="bicubic",
        color_jitter=color_jitter,
        auto_augment=None if aa in (None, "", "none") else aa,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        re_num_splits=2 if resplit else 0,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )


def eval_transform(input_size: int, crop_pct: float | None = None) -> transforms.Compose:
    """Resize the short side to int(size / crop_pct), bicubic, then centre-crop. By default crop_pct is 224/256, above
    224 pixels 1 (no margin)."""
    if crop_pct is None:
        crop_pct = 224 / 256 if input_size <= 224 else 1.0
    return create_transform(
        input_size,
        interpolation="bicubic",
        crop_pct=crop_pct,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )

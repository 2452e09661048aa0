"""Transforms: the sizes that published accuracies rely on, and the crops' distributions."""

import math
import random

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from util.augment import OneDrawResizedCrop, eval_transform, finetune_transform, weak_transform


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"), [(224, None, 256), (28, None, 32), (448, None, 448), (28, 1.0, 28)]
)
def test_evaluation_resizes_the_short_side_then_crops(size, crop_pct, resized):
    transform = eval_transform(size, crop_pct)
    assert transform.transforms[0].size == resized
    assert transform(Image.new("RGB", (500, 375))).shape == (3, size, size)


def test_evaluation_normalises_with_imagenet_statistics():
    out = eval_transform(32)(Image.new("RGB", (64, 64), (255, 0, 0)))
    assert out[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)


def test_probing_crop_draws_once_and_clips():
    """Areas are uniform and aspects log-uniform; in a narrow image a wide crop is clipped, not drawn again."""
    torch.manual_seed(0)
    square = torch.zeros(3, 100, 100)
    boxes = [OneDrawResizedCrop.get_params(square, [0.08, 0.5], [3 / 4, 4 / 3]) for _ in range(4000)]
    areas = torch.tensor([h * w / 1e4 for _, _, h, w in boxes])
    logs = torch.tensor([math.log(w / h) for _, _, h, w in boxes])
    assert areas.mean() == pytest.approx(0.29, abs=0.01) and areas.min() < 0.09 and areas.max() > 0.49
    assert logs.mean() == pytest.approx(0, abs=0.02) and logs.abs().max() < math.log(4 / 3) + 0.05
    tops = torch.tensor([top / (100 - h) for top, _, h, _ in boxes])
    assert tops.mean() == pytest.approx(0.5, abs=0.02)

    narrow = torch.zeros(3, 400, 20)
    for _ in range(200):
        top, left, h, w = OneDrawResizedCrop.get_params(narrow, [0.9, 1.0], [3 / 4, 4 / 3])
        # 0.9 to 1 of 8,000 pixels at these aspects is 73 to 103 wide and tall: wider than the image, so clipped.
        assert (left, w) == (0, 20) and 72 <= h <= 104 and 0 <= top <= 400 - h


def test_pretraining_crop_is_the_papers():
    crop, flip, *_ = weak_transform(224, (0.2, 1.0)).transforms
    assert crop.scale == (0.2, 1.0) and crop.size == (224, 224) and crop.interpolation.value == "bicubic"
    assert flip.p == 0.5


def test_the_strongest_draws_of_randaugment_do_not_stop_a_run():
    """Posterize down to 0 bits, which Pillow 13 refuses, is black as it was before; and many draws of the default."""
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    strongest = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10, hparams={})
    assert strongest(image).getextrema() == ((0, 0),) * 3
    random.seed(0)
    transform = finetune_transform(32, (0.08, 1.0), None, "rand-m9-mstd2.0-inc1", 0.25, "pixel", 1, False)
    assert all(transform(image).isfinite().all() for _ in range(300))


def test_finetuning_augments_as_timm_does():
    on = finetune_transform(32, (0.08, 1.0), None, "rand-m9-mstd0.5-inc1", 1.0, "pixel", 1, False)
    names = [type(t).__name__ for t in on.transforms]
    assert "RandAugment" in names and names[-1] == "RandomErasing"
    off = finetune_transform(32, (0.08, 1.0), None, "none", 0.0, "pixel", 1, False)
    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & {type(t).__name__ for t in off.transforms}
    assert on(Image.new("RGB", (50, 40))).shape == (3, 32, 32)

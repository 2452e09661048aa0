"""Transforms: the sizes that published accuracies rely on, the distributions of crops, and timm's augmentations."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment, create_transform

from util.data.transforms import CentreCrop, FinetuneTransform, random_box

PHOTO = Path(__file__).parent / "photos" / "astronaut.jpg"


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"), [(224, None, 256), (28, None, 32), (448, None, 448), (28, 1.0, 28)]
)
def test_evaluation_resizes_the_short_side_then_crops(size, crop_pct, resized):
    """The result is that of timm's evaluation transform, within the rounding of two 8-bit resizers."""
    transform = CentreCrop(size, crop_pct)
    assert transform.cover[0] == resized
    pixels = np.array(Image.open(PHOTO).convert("RGB"))
    timms = create_transform(size, interpolation="bicubic", crop_pct=size / resized, mean=(0, 0, 0), std=(1, 1, 1))
    ours, theirs = transform(pixels), timms(Image.fromarray(pixels)) * 255
    assert ours.shape == theirs.shape == (3, size, size)
    assert (ours - theirs).abs().mean() < 0.5


def test_probing_crop_draws_once_and_clips():
    """In a narrow image a crop that is too wide is clipped; it is not drawn again."""
    random.seed(0)
    areas = [h * w / 1e4 for _, _, h, w in (random_box(100, 100, (0.08, 0.5), one_draw=True) for _ in range(4000))]
    assert sum(areas) / 4000 == pytest.approx(0.29, abs=0.01) and min(areas) < 0.09 and max(areas) > 0.49
    for _ in range(200):
        top, left, h, w = random_box(400, 20, (0.9, 1.0), one_draw=True)
        # 0.9 to 1 of 8,000 pixels at these aspects is 73 to 103 wide and tall: wider than the image, so clipped.
        assert (left, w) == (0, 20) and 72 <= h <= 104 and 0 <= top <= 400 - h


def test_the_strongest_draws_of_randaugment_do_not_stop_a_run():
    """Posterizing to 0 bits, which Pillow 13 refuses, gives a black image; 300 draws of the default policy work."""
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    transform = FinetuneTransform(32, (0.08, 1.0), None, "rand-m9-mstd2.0-inc1", 0.25, "pixel", 1)
    (policy,) = [step for step in transform.steps.transforms if hasattr(step, "ops")]
    (strongest,) = [op for op in policy.ops if op.name == "PosterizeIncreasing"]
    assert strongest.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert strongest.aug_fn(image, 4) == auto_augment.posterize(image, 4)
    random.seed(0)
    pixels = np.asarray(image)
    assert all(transform(pixels).isfinite().all() for _ in range(300))


@pytest.mark.parametrize("policy", ["original", "v0", "3a", "rand-m9", "augmix-m5-w4-d2"])
def test_every_policy_survives_its_strongest_posterize(policy):
    transform = FinetuneTransform(32, (0.08, 1.0), None, policy, 0.0, "pixel", 1)
    ops = [
        op
        for step in transform.steps.transforms
        for ops in (getattr(step, "ops", []), *getattr(step, "policy", []))
        for op in ops
        if op.name.startswith("Posterize")
    ]
    assert all(op.aug_fn is not auto_augment.posterize for op in ops) and (ops or policy == "3a")


def test_the_project_leaves_timm_as_it_was(script):
    words = """
from timm.data import auto_augment
before = dict(auto_augment.NAME_TO_OP)
import main_finetune
main_finetune.FinetuneTransform(32, (0.08, 1.0), None, "rand-m9", 0.25, "pixel", 1)
print(before == auto_augment.NAME_TO_OP)
"""
    assert script("-c", words).stdout == "True\n"


def test_finetuning_augments_as_timm_does():
    on = FinetuneTransform(32, (0.08, 1.0), None, "rand-m9-mstd0.5-inc1", 1.0, "pixel", 1)
    names = [type(t).__name__ for t in on.steps.transforms]
    assert "RandAugment" in names and names[-1] == "RandomErasing"
    off = FinetuneTransform(32, (0.08, 1.0), None, "none", 0.0, "pixel", 1)
    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & {type(t).__name__ for t in off.steps.transforms}
    assert on(np.zeros((40, 50, 3), np.uint8)).shape == (3, 32, 32)

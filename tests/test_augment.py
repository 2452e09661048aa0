"""Transforms: the sizes that published accuracies rely on, the distributions of crops, and timm's augmentations."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from util.data import transforms
from util.data.images import PixelSpec, load_array
from util.data.loaders import DeviceLoader, collate
from util.data.transforms import CentreCrop, Crop, FinetuneTransform, random_box, replace_posterize
from util.rng import seed_all

PHOTO = Path(__file__).parent / "photos" / "astronaut.jpg"
PHOTOS = sorted(PHOTO.parent.glob("*.jpg"))
RECIPE = "rand-m9-mstd0.5-inc1"  # --aa of the published fine-tuning
AS_THEY_ARE = PixelSpec(3, (0.0,) * 3, (1.0,) * 3)  # normalisation that changes nothing


def create_timms(size, pixels=AS_THEY_ARE, aa=None, **more):
    """Create timm's transform of fine-tuning; of its posterize only what Pillow 13 refuses is replaced."""
    common = {"scale": (0.08, 1.0), "interpolation": "bicubic", "mean": pixels.mean, "std": pixels.std}
    created = create_transform(
        size, is_training=True, **common | {"color_jitter": None, "auto_augment": aa, "re_mode": "pixel"} | more
    )
    for part in created if isinstance(created, tuple) else (created,):
        replace_posterize(part)
    return created


def load(transform, image, pixels=AS_THEY_ARE):
    """Transform an image, and normalise and erase it as a loader's batches are; return [C, H, W]."""
    cpu = torch.device("cpu")
    batches = torch.utils.data.DataLoader([(transform(image), 0)], 1, collate_fn=collate)
    ((imgs, _),) = DeviceLoader(batches, cpu, pixels)
    return imgs[0]


def distance(ours, theirs):
    """Return the Kolmogorov-Smirnov distance of two samples, in units of the 1 % bound for samples of their sizes."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    values = np.concatenate([ours, theirs])
    shares = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(shares[0] - shares[1]).max() / (1.63 * (1 / len(ours) + 1 / len(theirs)) ** 0.5)


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
    (policy,) = transform.augment.transforms
    (strongest,) = [op for op in policy.ops if op.name == "PosterizeIncreasing"]
    assert strongest.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert strongest.aug_fn(image, 4) == auto_augment.posterize(image, 4)
    random.seed(0)
    pixels = np.array(image)
    assert all(load(transform, pixels).isfinite().all() for _ in range(300))


@pytest.mark.parametrize("policy", ["original", "v0", "3a", "rand-m9", "augmix-m5-w4-d2"])
def test_every_policy_survives_its_strongest_posterize(policy):
    transform = FinetuneTransform(32, (0.08, 1.0), None, policy, 0.0, "pixel", 1)
    ops = [
        op
        for step in transform.augment.transforms
        for ops in (getattr(step, "ops", []), *getattr(step, "policy", []))
        for op in ops
        if op.name.startswith("Posterize")
    ]
    assert all(op.aug_fn is not auto_augment.posterize for op in ops) and (ops or policy == "3a")


@pytest.mark.slow
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
    on = FinetuneTransform(32, (0.08, 1.0), None, RECIPE, 1.0, "pixel", 1)
    assert [type(step).__name__ for step in on.augment.transforms] == ["RandAugment"] and on.erase.probability == 1
    off = FinetuneTransform(32, (0.08, 1.0), None, "none", 0.0, "pixel", 1)
    assert not off.augment.transforms and off.erase.probability == 0
    assert load(on, np.zeros((40, 50, 3), np.uint8)).shape == (3, 32, 32)


@pytest.mark.parametrize("shape", [(300, 500), (400, 90)])
def test_finetuning_crops_and_flips_are_distributed_as_timms(shape, monkeypatch):
    """In the narrow image most boxes do not fit, and are drawn again or replaced by the middle."""
    boxes = []

    def record(*args):
        boxes.append(random_box(*args))
        return boxes[-1]

    # The grey of the image rises from left to right: a result that falls was flipped.
    monkeypatch.setattr(transforms, "random_box", record)
    pixels = np.broadcast_to(np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None], (*shape, 3)).copy()
    ours = FinetuneTransform(4, (0.08, 1.0), None, "none", 0.0, "pixel", 1)
    seed_all(1)
    results = [ours(pixels).img[0, 0].int() for _ in range(2500)]
    flips = np.mean([(row[0] > row[-1]).item() for row in results])

    crop, flip = create_timms(4).transforms[:2]
    seed_all(2)
    theirs = [crop.get_params(Image.new("L", shape[::-1]), crop.scale, crop.ratio) for _ in range(2500)]
    samples = []
    for top, left, height, width in (np.array(boxes).T, np.array(theirs).T):
        # Where a box is as long as the image, its position says nothing.
        places = [start / np.maximum(1, free) for start, free in ((top, shape[0] - height), (left, shape[1] - width))]
        samples.append([height * width, width / height, height, width, *places])
    for name, mine, others in zip(("area", "aspect", "height", "width", "top", "left"), *samples, strict=True):
        assert distance(mine, others) < 1, name
    assert flips == pytest.approx(flip.p, abs=2.58 * (0.25 / 2500) ** 0.5), "1 %"


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_in_pillows_order_of_channels_have_the_same_pixels(channels):
    pixels, crop = load_array(str(PHOTO), PixelSpec(channels)), Crop((40, 56), (0.08, 1.0))
    for seed in range(20):
        random.seed(seed)
        usual = crop(pixels)
        random.seed(seed)
        interleaved = crop(pixels, channels_last=True)
        assert torch.equal(interleaved, usual) and interleaved.permute(1, 2, 0).is_contiguous(), seed


def test_finetuning_pixels_are_those_of_timms_crop_of_the_same_box(monkeypatch):
    ours = FinetuneTransform(224, (0.08, 1.0), None, "none", 0.0, "pixel", 1, AS_THEY_ARE)
    (crop, flip, *rest) = create_timms(224).transforms
    for file in PHOTOS:
        pixels = load_array(str(file))
        for seed in range(3):
            random.seed(seed)
            mine = load(ours, pixels) * 255
            random.seed(seed)
            box, flip.p = random_box(*pixels.shape[:2], crop.scale), random.random() < 0.5
            monkeypatch.setattr(crop, "get_params", lambda *_, box=box: box)
            others = Image.fromarray(pixels)
            for step in (crop, flip, *rest):
                others = step(others)
            assert (mine - others * 255).abs().mean() < 0.5, (file.name, seed)


@pytest.mark.parametrize(
    ("policy", "jitter", "channels", "size"),
    [
        *[
            (policy, jitter, channels, (40, 56))
            for policy, jitter in [(RECIPE, None), ("3a", 0.4), ("original", None), ("none", 0.4)]
            for channels in (1, 3)
        ],
        ("augmix-m3", None, 3, (48, 48)),  # timm 1.0.29's AugMix takes squares in colour only
    ],
)
def test_what_follows_the_crop_is_timms_bit_for_bit(policy, jitter, channels, size):
    """For the same random numbers, timm's parts after its own crop make the same of a crop for pre-training."""
    pixels = PixelSpec(channels, *PixelSpec.default_mean_std(channels))
    image = load_array(str(PHOTO), pixels)
    ours = FinetuneTransform(size, (0.08, 1.0), jitter, policy, 0.5, "rand", 2, pixels)
    more = {"color_jitter": jitter, "re_prob": 0.5, "re_mode": "rand", "re_count": 2, "separate": True}
    _, secondary, final = create_timms(size, pixels, None if policy == "none" else policy, **more)
    for seed in range(20):
        seed_all(seed)
        mine = load(ours, image, pixels)
        seed_all(seed)
        crop = Crop(size, (0.08, 1.0))(image).permute(1, 2, 0).numpy()
        others = final(secondary(Image.fromarray(crop[..., 0] if channels == 1 else crop)))
        assert torch.equal(mine, others) and mine.is_contiguous(), seed


def record_operations(policy, run):
    """Run 2,000 augmentations; return the shares of them that did 0, 1, 2 operations, and the calls by operation."""
    calls = {op.name: [] for op in policy.ops}
    for op in policy.ops:
        op.aug_fn = lambda img, *level, own=calls[op.name], **options: own.append((level, options)) or img
    totals = [0]
    for _ in range(2000):
        run()
        totals.append(sum(map(len, calls.values())))
    return np.bincount(np.diff(totals), minlength=3) / 2000, calls


def test_operations_of_randaugment_are_distributed_as_timms():
    pixels = np.full((8, 8, 3), 200, np.uint8)
    transform = FinetuneTransform(8, (0.08, 1.0), None, RECIPE, 0.0, "pixel", 1, AS_THEY_ARE)
    _, secondary, _ = create_timms(8, aa=RECIPE, separate=True)
    seed_all(3)
    shares, ours = record_operations(transform.augment.transforms[0], lambda: transform(pixels))
    seed_all(4)
    timms_shares, theirs = record_operations(secondary.transforms[0], lambda: secondary(Image.fromarray(pixels)))

    # Two operations are chosen, each of which is done with probability 0.5.
    for found in (shares, timms_shares):
        assert found == pytest.approx(np.array([0.25, 0.5, 0.25]), abs=0.03), "1 %"
    # Each of 15 is as frequent, its levels have the same distribution, and fill and interpolation are the same.
    assert list(ours) == list(theirs) and len(ours) == 15
    for name in ours:
        (levels, options), (timms_levels, timms_options) = (zip(*calls[name], strict=True) for calls in (ours, theirs))
        assert abs(len(levels) - len(timms_levels)) < 55, f"{name}: 133 expected, 0.1 % of each pair"
        assert all(option == timms_options[0] for option in options), name
        if timms_levels[0]:
            assert distance(np.concatenate(levels), np.concatenate(timms_levels)) < 1.25, f"{name}: 0.05 % of each"


@pytest.mark.parametrize(("mode", "count", "dtype"), [("pixel", 1, np.uint8), ("const", 3, np.float32)])
def test_erased_boxes_are_distributed_as_timms(mode, count, dtype):
    """Grey pixels that were erased have another value; what is no 8-bit image is erased in the same way."""
    grey, moments = np.full((40, 50, 3), 200, np.uint8), PixelSpec(3, (0.4,) * 3, (0.25,) * 3)
    pixels = grey if dtype == np.uint8 else (grey / 255).astype(np.float32)
    transform = FinetuneTransform(32, (0.08, 1.0), None, "none", 0.25, mode, count, moments)
    _, _, final = create_timms(32, moments, re_prob=0.25, re_mode=mode, re_count=count, separate=True)
    normalised, areas = (200 / 255 - 0.4) / 0.25, []
    for seed, run in (
        (5, lambda: load(transform, pixels, moments)),
        (6, lambda: final(Image.fromarray(grey[:32, :32]))),
    ):
        seed_all(seed)
        areas.append(np.array([np.mean(np.abs(run()[0].numpy() - normalised) > 1e-4) for _ in range(2000)]))
    assert [np.mean(side > 0) for side in areas] == pytest.approx([0.25, 0.25], abs=0.025), "1 %"
    assert distance(*[side[side > 0] for side in areas]) < 1


class Augmented:
    """Dataset of an image that is augmented with the random streams of each index."""

    def __init__(self, transform, image):
        self.transform, self.image = transform, image

    def __len__(self):
        return 24

    def __getitem__(self, index):
        seed_all(index)
        return self.transform(self.image), index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 4])
def test_batches_erase_what_is_erased_of_each_image_alone(count, workers):
    transform = FinetuneTransform((20, 30), (0.08, 1.0), None, "none", 0.5, "pixel", count)
    data = Augmented(transform, load_array(str(PHOTO)))
    expected = []
    for index in range(len(data)):
        seed_all(index)
        expected.append(load(transform, data.image))
    batches = torch.utils.data.DataLoader(data, 8, num_workers=workers, collate_fn=collate)
    found = list(DeviceLoader(batches, torch.device("cpu"), AS_THEY_ARE))
    assert torch.equal(torch.cat([imgs for imgs, _ in found]), torch.stack(expected))
    assert all(imgs.is_contiguous() and imgs.dtype == torch.float32 for imgs, _ in found)
    boxes = [data[index][0].boxes for index in range(len(data))]
    assert 4 < sum(map(bool, boxes)) < 20 and max(map(len, boxes)) == count

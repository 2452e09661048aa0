"""Images: pixels as Pillow decodes and resizes them, flips, normalisation, and the distribution of crops."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from util.data import datasets, images, loaders, splits, transforms
from util.data.images import PixelSpec, load_array
from util.data.splits import DataSpec

PHOTOS = sorted((Path(__file__).parent / "photos").glob("*.jpg"))
FOLDER = os.environ.get("MAE_PHOTOS")  # another folder of photographs to compare on
BOXES = 5


def photographs():
    return sorted(Path(FOLDER).rglob("*.JPEG")) + sorted(Path(FOLDER).rglob("*.jpg")) if FOLDER else PHOTOS


def decode_with_pillow(file):
    return np.asarray(Image.open(file).convert("RGB"))


def pixel_differences(file):
    """Return the absolute differences to Pillow's pixels, in levels, over BOXES crops with fixed seeds."""
    picture = Image.open(file).convert("RGB")
    levels = []
    for seed in range(BOXES):
        random.seed(seed)
        ours = transforms.Crop(224, (0.2, 1.0))(load_array(str(file)))
        random.seed(seed)
        box = transforms.random_box(picture.height, picture.width, (0.2, 1.0))
        theirs = tv.functional.resized_crop(picture, *box, [224, 224], tv.InterpolationMode.BICUBIC)
        theirs = tv.functional.pil_to_tensor(theirs)
        if random.random() < 0.5:
            theirs = theirs.flip(2)
        levels.append((ours.int() - theirs.int()).abs().float())
    return torch.stack(levels)


def test_crops_are_pillows_within_half_a_level():
    means, high = {}, {}
    for file in photographs():
        found = pixel_differences(file)
        means[file.name], high[file.name] = found.mean().item(), np.quantile(found.numpy(), 0.999)
    assert max(means.values()) <= 0.5 and max(high.values()) <= 8, (means, high)
    print(f"{len(means)} photographs: mean at most {max(means.values()):.3f}, 99.9 % at most {max(high.values()):.0f}")


@pytest.mark.parametrize("file", PHOTOS, ids=lambda file: file.name)
def test_decoded_pixels_are_pillows_bit_for_bit(file, monkeypatch):
    expected = decode_with_pillow(file)
    assert np.array_equal(load_array(str(file)), expected)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(load_array(str(file)), expected), "without simplejpeg"


def test_plain_jpegs_do_not_go_through_pillow(monkeypatch):
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(Image, "open", None)
    assert load_array(str(PHOTOS[0])).shape == (400, 400, 3)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_odd_jpegs_get_pillows_pixels(mode, tmp_path):
    Image.open(PHOTOS[1]).convert(mode).save(tmp_path / "odd.jpg", quality=90)
    assert np.array_equal(load_array(str(tmp_path / "odd.jpg")), decode_with_pillow(tmp_path / "odd.jpg"))


def test_damaged_jpegs_are_pillows_to_judge(tmp_path):
    """A file that is cut off is bad; one with a stray byte between segments, which Pillow accepts, is not."""
    data = PHOTOS[1].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(images.BadImage, match="cut.jpg"):
        load_array(str(tmp_path / "cut.jpg"))
    (tmp_path / "stray.jpg").write_bytes(data + b"\0" * 7)
    assert np.array_equal(load_array(str(tmp_path / "stray.jpg")), decode_with_pillow(PHOTOS[1]))


def test_flipped_pixels_are_the_same_ones_mirrored():
    pixels, crop = load_array(str(PHOTOS[1])), transforms.Crop(64, (0.2, 1.0))
    flips = 0
    for seed in range(400):
        random.seed(seed)
        ours = crop(pixels)
        random.seed(seed)
        top, left, height, width = transforms.random_box(*pixels.shape[:2], crop.scale)
        plain = transforms.to_size(pixels[top : top + height, left : left + width].copy(), (64, 64))
        flipped = random.random() < 0.5
        assert torch.equal(ours, plain.flip(2) if flipped else plain)
        flips += flipped
    assert 160 < flips < 240


def test_batches_are_normalised_exactly_as_totensor_and_normalize_do():
    picture = Image.open(PHOTOS[0])
    usual = tv.Compose([tv.ToTensor(), tv.Normalize(PixelSpec().mean, PixelSpec().std)])
    batch = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], torch.zeros(1))

    class Loader(list):
        dataset = sampler = None
        num_workers = 0

    feed = loaders.DeviceLoader(Loader([batch]), torch.device("cpu"), PixelSpec())
    ((imgs, _),) = feed
    assert torch.equal(imgs[0], usual(picture))


def test_crops_follow_the_stated_distribution():
    """The area is uniform, the aspect ratio log-uniform between 3/4 and 4/3, and the position uniform."""
    random.seed(0)
    boxes = torch.tensor([transforms.random_box(1000, 1000, (0.2, 0.5)) for _ in range(6000)]).double()
    top, left, height, width = boxes.T
    area, aspect = (height * width / 1e6 - 0.2) / 0.3, torch.log(width / height) / np.log(4 / 3) / 2 + 0.5
    for uniform in (area, aspect, top / (1000 - height), left / (1000 - width)):
        ordered = uniform.sort().values
        distance = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
        assert distance < 1.63 / len(ordered) ** 0.5 + 0.003, "Kolmogorov-Smirnov, 1 %, and rounding to pixels"


def test_pretraining_crops_are_distributed_as_torchvisions():
    """Ten quantiles of 6,000 draws agree where boxes may not fit, and so does the box if no draw can fit."""
    random.seed(0), torch.manual_seed(0)
    image = torch.zeros(3, 300, 500)
    ours = torch.tensor([transforms.random_box(300, 500, (0.2, 1.0)) for _ in range(6000)]).double()
    theirs = [tv.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for mine, others in zip(ours.T, torch.tensor(theirs).double().T, strict=True):
        assert (mine.quantile(levels) - others.quantile(levels)).abs().max() <= 12, "pixels"
    narrow = torch.zeros(3, 400, 20)
    box = tv.RandomResizedCrop.get_params(narrow, [0.9, 1.0], [3 / 4, 4 / 3])
    assert transforms.random_box(400, 20, (0.9, 1.0)) == tuple(box)
    wide = tv.RandomResizedCrop.get_params(narrow.mT, [0.9, 1.0], [3 / 4, 4 / 3])
    assert transforms.random_box(20, 400, (0.9, 1.0)) == tuple(wide)


@pytest.mark.parametrize("make", [transforms.Crop, lambda size, _: transforms.CentreCrop(size)])
def test_transforms_ship_bytes(make):
    random.seed(0)
    out = make(64, (0.2, 1.0))(load_array(str(PHOTOS[2])))
    assert out.shape == (3, 64, 64) and out.dtype == torch.uint8


def test_same_seed_gives_the_same_crops_for_any_number_of_workers(tmp_path):
    for number in range(3):
        (tmp_path / "train" / str(number)).mkdir(parents=True)
        for file in PHOTOS:
            (tmp_path / "train" / str(number) / file.name).symlink_to(file)

    def epoch(workers):
        loader = loaders.train_loader(
            DataSpec(str(tmp_path)),
            transforms.Crop(32, (0.2, 1.0)),
            PixelSpec(),
            loaders.Loading(5, workers, True, 7, torch.device("cpu")),
        )
        loader.sampler.set_epoch(3)
        return torch.cat([imgs for imgs, _ in loader])

    alone = epoch(0)
    assert torch.equal(alone, epoch(1)) and torch.equal(alone, epoch(2))


def make_class_folders(root, count):
    for name in ("a", "b"):
        (root / "train" / name / "deeper").mkdir(parents=True)
        for number in range(count):
            (root / "train" / name / f"{number}.jpg").touch()
            (root / "train" / name / "deeper" / f"{number}.PNG").touch()
        (root / "train" / name / ".hidden.jpg").touch()
        (root / "train" / name / "notes.txt").touch()
    return root / "train"


def test_the_listing_is_torchvisions(tmp_path):
    root = make_class_folders(tmp_path, 12)
    (root / "a" / ".hidden.jpg").unlink(), (root / "b" / ".hidden.jpg").unlink()
    theirs = ImageFolder(root)
    ours = datasets.Images(root, splits.list_split(splits.source_at(root), "train"), None, PixelSpec())
    assert list(ours.samples) == [ours.samples[i] for i in range(len(ours))] == theirs.samples
    assert ours.targets.tolist() == theirs.targets and ours.class_to_idx == theirs.class_to_idx

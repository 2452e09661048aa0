"""What the data path makes of a picture: Pillow's pixels, exact boxes, flips and normalisation, the stated crops."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from util import augment, datasets, gpu_decode, images, listing, loaders
from util.images import Pixels, load_array

PHOTOS = sorted((Path(__file__).parent / "photos").glob("*.jpg"))
FOLDER = os.environ.get("MAE_PHOTOS")  # a folder of other photographs to compare on
BOXES = 5


def photographs():
    return sorted(Path(FOLDER).rglob("*.JPEG")) + sorted(Path(FOLDER).rglob("*.jpg")) if FOLDER else PHOTOS


def with_pillow(file):
    return np.asarray(Image.open(file).convert("RGB"))


def differences(file):
    """|ours - Pillow's| over BOXES crops, whose boxes follow from the seed."""
    picture = Image.open(file).convert("RGB")
    levels = []
    for seed in range(BOXES):
        random.seed(seed)
        ours = augment.Crop(224, (0.2, 1.0))(load_array(str(file)))
        random.seed(seed)
        box = augment.random_box(picture.height, picture.width, (0.2, 1.0))
        theirs = transforms.functional.resized_crop(picture, *box, [224, 224], transforms.InterpolationMode.BICUBIC)
        theirs = transforms.functional.pil_to_tensor(theirs)
        if random.random() < 0.5:
            theirs = theirs.flip(2)
        levels.append((ours.int() - theirs.int()).abs().float())
    return torch.stack(levels)


def test_crops_are_pillows_within_half_a_level():
    means, high = {}, {}
    for file in photographs():
        found = differences(file)
        means[file.name], high[file.name] = found.mean().item(), np.quantile(found.numpy(), 0.999)
    assert max(means.values()) <= 0.5 and max(high.values()) <= 8, (means, high)
    print(f"{len(means)} photographs: mean at most {max(means.values()):.3f}, 99.9 % at most {max(high.values()):.0f}")


@pytest.mark.parametrize("file", PHOTOS, ids=lambda file: file.name)
def test_decoded_pixels_are_pillows_bit_for_bit(file, monkeypatch):
    expected = with_pillow(file)
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
    assert np.array_equal(load_array(str(tmp_path / "odd.jpg")), with_pillow(tmp_path / "odd.jpg"))


def test_damaged_jpegs_are_pillows_to_judge(tmp_path):
    """Cut off: bad. A stray byte between segments, which Pillow forgives: Pillow's pixels."""
    data = PHOTOS[1].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(images.BadImage, match="cut.jpg"):
        load_array(str(tmp_path / "cut.jpg"))
    (tmp_path / "stray.jpg").write_bytes(data + b"\0" * 7)
    assert np.array_equal(load_array(str(tmp_path / "stray.jpg")), with_pillow(PHOTOS[1]))


def test_flipped_pixels_are_the_same_ones_mirrored():
    pixels, crop = load_array(str(PHOTOS[1])), augment.Crop(64, (0.2, 1.0))
    flips = 0
    for seed in range(400):
        random.seed(seed)
        ours = crop(pixels)
        random.seed(seed)
        top, left, height, width = augment.random_box(*pixels.shape[:2], crop.scale)
        plain = augment.to_size(pixels[top : top + height, left : left + width].copy(), (64, 64))
        flipped = random.random() < 0.5
        assert torch.equal(ours, plain.flip(2) if flipped else plain)
        flips += flipped
    assert 160 < flips < 240


def test_batches_are_normalised_exactly_as_totensor_and_normalize_do():
    picture = Image.open(PHOTOS[0])
    usual = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize(Pixels().mean, Pixels().std)
    ])  # fmt: skip
    batch = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], torch.zeros(1))

    class Loader(list):
        dataset = sampler = None
        num_workers = 0

    feed = loaders.Feed(Loader([batch]), torch.device("cpu"), Pixels())
    (imgs, _), = feed
    assert torch.equal(imgs[0], usual(picture))


def test_crops_follow_the_stated_distribution():
    """Area uniform, aspect log-uniform in 3/4 to 4/3, position uniform."""
    random.seed(0)
    boxes = torch.tensor([augment.random_box(1000, 1000, (0.2, 0.5)) for _ in range(6000)]).double()
    top, left, height, width = boxes.T
    area, aspect = (height * width / 1e6 - 0.2) / 0.3, torch.log(width / height) / np.log(4 / 3) / 2 + 0.5
    for uniform in (area, aspect, top / (1000 - height), left / (1000 - width)):
        ordered = uniform.sort().values
        distance = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
        assert distance < 1.63 / len(ordered) ** 0.5 + 0.003, "Kolmogorov-Smirnov, 1 %, and rounding to pixels"


def test_pretraining_crops_are_distributed_as_torchvisions():
    """Where boxes may not fit: means and quantiles of 6,000 draws of each, and the same box when no draw can fit."""
    random.seed(0), torch.manual_seed(0)
    image = torch.zeros(3, 300, 500)
    ours = torch.tensor([augment.random_box(300, 500, (0.2, 1.0)) for _ in range(6000)]).double()
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for mine, others in zip(ours.T, torch.tensor(theirs).double().T, strict=True):
        assert (mine.quantile(levels) - others.quantile(levels)).abs().max() <= 12, "pixels"
    narrow = torch.zeros(3, 400, 20)
    box = transforms.RandomResizedCrop.get_params(narrow, [0.9, 1.0], [3 / 4, 4 / 3])
    assert augment.random_box(400, 20, (0.9, 1.0)) == tuple(box)
    wide = transforms.RandomResizedCrop.get_params(narrow.mT, [0.9, 1.0], [3 / 4, 4 / 3])
    assert augment.random_box(20, 400, (0.9, 1.0)) == tuple(wide)


@pytest.mark.parametrize("make", [augment.Crop, lambda size, _: augment.CentreCrop(size)])
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
            str(tmp_path), augment.Crop(32, (0.2, 1.0)), 5, workers, True, 7, Pixels(), torch.device("cpu")
        )
        loader.sampler.set_epoch(3)
        return torch.cat([imgs for imgs, _ in loader])

    alone = epoch(0)
    assert torch.equal(alone, epoch(1)) and torch.equal(alone, epoch(2))


def folder_of(root, count):
    for name in ("a", "b"):
        (root / "train" / name / "deeper").mkdir(parents=True)
        for number in range(count):
            (root / "train" / name / f"{number}.jpg").touch()
            (root / "train" / name / "deeper" / f"{number}.PNG").touch()
        (root / "train" / name / ".hidden.jpg").touch()
        (root / "train" / name / "notes.txt").touch()
    return root / "train"


def walks(monkeypatch):
    count = []
    walk = listing._walk
    monkeypatch.setattr(listing, "_walk", lambda *args: count.append(1) or walk(*args))
    return count


def test_the_listing_is_torchvisions(tmp_path):
    root = folder_of(tmp_path, 12)
    (root / "a" / ".hidden.jpg").unlink(), (root / "b" / ".hidden.jpg").unlink()
    theirs = ImageFolder(root)
    ours = datasets.Images(root, None, Pixels())
    assert list(ours.samples) == [ours.samples[i] for i in range(len(ours))] == theirs.samples
    assert ours.targets.tolist() == theirs.targets and ours.class_to_idx == theirs.class_to_idx


def test_a_second_start_does_not_walk_the_folder_unless_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "GRAIN_NS", 0)
    root, count = folder_of(tmp_path / "data", 3), walks(monkeypatch)

    def start():
        return len(datasets.Images(root, None, Pixels()))

    assert start() == start() == 12 and len(count) == 1
    (root / "b" / "deeper" / "new.jpg").touch()
    assert start() == start() == 13 and len(count) == 2
    (root / "a" / "0.jpg").unlink()
    assert start() == 12 and len(count) == 3
    (root / "a" / "1.jpg").rename(root / "a" / "one.jpg")
    assert any(path.endswith("one.jpg") for path, _ in datasets.Images(root, None, Pixels()).samples)
    next((tmp_path / "cache" / "mae").glob("*.npz")).write_bytes(b"damaged")
    assert start() == 12


def test_a_folder_that_changed_just_now_is_not_remembered(tmp_path, monkeypatch):
    """Within the clock's grain a second change would leave no trace."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, count = folder_of(tmp_path / "data", 1), walks(monkeypatch)
    datasets.Images(root, None, Pixels()), datasets.Images(root, None, Pixels())
    assert len(count) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(listing, "GRAIN_NS", 0)
    assert len(datasets.Images(folder_of(tmp_path, 2), None, Pixels())) == 8


def late(device):
    """Crops of the photographs decoded by the batch on a device, and the same crops made at once."""
    crop = augment.Crop(64, (0.2, 1.0))
    batch, expected = [], []
    for number, file in enumerate(PHOTOS):
        for work, out in ((lambda f: gpu_decode.LaterCrop(crop)(gpu_decode.read(f)), batch),
                          (lambda f: crop(load_array(f)), expected)):  # fmt: skip
            random.seed(number)
            out.append((work(str(file)), number))
    ours = gpu_decode.crops(gpu_decode.collate(batch)[0], crop.size, device).cpu()
    return batch, ours, torch.stack([img for img, _ in expected])


def test_crops_decoded_by_the_batch_are_the_same_crops():
    """On the CPU, where the decoder is libjpeg too: only the rounding of the resizer differs."""
    _, ours, expected = late(torch.device("cpu"))
    assert (ours.int() - expected.int()).abs().float().mean() < 0.3 and (ours.int() - expected.int()).abs().max() <= 3


def undecoded(files):
    """Samples of crops of 32 pixels that are still to be decoded; their classes are their numbers."""
    crop = gpu_decode.LaterCrop(augment.Crop(32, (0.5, 1.0)))
    return [(crop(gpu_decode.read(str(file))), number) for number, file in enumerate(files)]


def test_pictures_keep_their_places_in_few_tensors():
    """Each tensor of a batch takes a file descriptor, of which a process has 1024."""
    jpegs = undecoded(PHOTOS)
    pixels = [(torch.full((3, 32, 32), n, dtype=torch.uint8), n) for n in range(len(jpegs))]
    mixed, classes = gpu_decode.collate([one for pair in zip(jpegs, pixels, strict=True) for one in pair])
    assert classes.tolist() == [n // 2 for n in range(10)] and sum(isinstance(x, torch.Tensor) for x in mixed) == 2
    out = gpu_decode.crops(mixed, (32, 32), torch.device("cpu"))
    assert torch.equal(out[1::2], torch.stack([img for img, _ in pixels]))
    assert torch.equal(out[0::2], gpu_decode.crops(gpu_decode.collate(jpegs)[0], (32, 32), torch.device("cpu")))
    assert torch.equal(out[1::2], gpu_decode.crops(gpu_decode.collate(pixels)[0], (32, 32), torch.device("cpu")))


def test_a_loader_process_shares_a_batch_itself(monkeypatch):
    """Else a thread does, which only prints that /dev/shm is full, and the run waits for the batch for ever."""
    samples = undecoded(PHOTOS[:1])
    assert not gpu_decode.collate(samples)[0].data.is_shared()
    monkeypatch.setattr(gpu_decode, "get_worker_info", lambda: True)
    assert gpu_decode.collate(samples)[0].data.is_shared()


def test_a_full_gpu_is_not_taken_for_a_bad_picture(monkeypatch):
    def full(*_):
        raise RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(gpu_decode, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_decode.crops(gpu_decode.collate(undecoded(PHOTOS[:1]))[0], (32, 32), torch.device("cpu"))


CUDA = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@on_gpu
def test_nvjpegs_pixels_are_near_libjpegs():
    _, ours, expected = late(CUDA)
    assert (ours.int() - expected.int()).abs().float().mean() < 2


@pytest.mark.gpu
@on_gpu
def test_nvjpeg_leaves_memory_alone_that_queued_work_still_reads():
    """As a step's activations: freed for the next allocation, read by what the GPU has yet to do."""
    batch, _ = gpu_decode.collate(undecoded(PHOTOS * 8))
    gpu_decode.crops(batch, (32, 32), CUDA)
    busy = torch.randn(4096, 4096, device=CUDA)
    for _ in range(20):
        held = [torch.full((3, 512, 512), 7, dtype=torch.uint8, device=CUDA) for _ in range(64)]
        torch.cuda.synchronize()
        for _ in range(20):
            busy @ busy
        sums = [one.sum(dtype=torch.int64) for one in held]
        del held
        gpu_decode.crops(batch, (32, 32), CUDA)
        assert torch.stack(sums).unique().tolist() == [7 * 3 * 512 * 512]


@pytest.mark.gpu
@on_gpu
def test_a_large_picture_becomes_a_small_one_on_the_gpu():
    pixels = torch.randint(256, (3, 2000, 2000), dtype=torch.uint8)
    plan = augment.CropPlan(0, 0, 2000, 2000, False)
    ours, expected = (gpu_decode._cut(pixels.to(place), plan, (28, 28), place) for place in (CUDA, torch.device("cpu")))
    assert ours.device == CUDA and torch.equal(ours.cpu(), expected)


def test_a_torchvision_without_decoders_refuses_only_that_flag(script):
    """As 0.29 announces: the scripts still start."""
    words = """
import torch, torchvision.io
del torchvision.io.decode_jpeg
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
import main_pretrain, models_mae
from util import options
for flags in ([], ["--gpu_decode"]):
    args = main_pretrain.get_args(["--data_path", ".", "--device", "cuda", "--output_dir", "", *flags])
    try:
        options.check(args, models_mae.MODELS)
        print("fine")
    except options.UserError as error:
        print(error)
"""
    result = script("-c", words)
    said = result.stdout.splitlines()
    assert len(said) == 2 and said[0] == "fine" and said[1].startswith("--gpu_decode: this torchvision has no"), result


def test_a_bad_jpeg_in_a_batch_is_replaced_and_named(capsys):
    batch, _, expected = late(torch.device("cpu"))
    picture, target = batch[1]
    batch[1] = picture._replace(data=picture.data[:2000], path="cut.jpg"), target
    out = gpu_decode.crops(gpu_decode.collate(batch)[0], (64, 64), torch.device("cpu"))
    assert "cut.jpg" in capsys.readouterr().err and (out[0].int() - expected[0].int()).abs().max() <= 3
    assert any(torch.equal(out[1], out[other]) for other in (0, 2, 3, 4))

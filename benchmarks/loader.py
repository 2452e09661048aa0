"""Measure how fast images are loaded and decoded, and the time and memory that a long list of files takes.

    python benchmarks/loader.py --data_path FOLDER --json loader.json

FOLDER/train/<class>/*.jpg are photographs. The rows of the first table, with one thread per process, are those of
pre-training's augmentation (crop of 0.2 to 1 of the area, resized to --input_size, flip):
    classic            ImageFolder, Pillow, RandomResizedCrop (bicubic), flip, ToTensor, Normalize
    ours               the scripts' loader up to the batch of bytes that goes to the device, which normalises it
    tar                the same, of the same images in tar archives of 1,000 each
    decode             the scripts' decoder alone, from files to arrays of pixels: no loader can be faster
and those of fine-tuning's (crop of 0.08 to 1 of the area, flip, rand-m9-mstd0.5-inc1, normalisation, erasing of a
quarter of the images):
    finetune_classic   ImageFolder, Pillow, timm's transform; only its posterize to 0 bits, which Pillow 13 refuses, is
                       replaced
    finetune_ours      the scripts' loader up to the batch of bytes, which the device normalises and erases
    finetune_no_aa     the same without RandAugment: what that costs is the difference to finetune_ours
Ratios are to the classic row of the same augmentation, medians over repetitions. Every repetition runs each row once
over the images, which are linked as often as it takes to have --images of them. The figures are medians of --repeat
repetitions, after one that warms up.

The second table is about synthetic splits of empty files, 1,000 to a class, in folders and in an archive: the seconds
until the files are listed, the bytes of the list per file, and the growth of the memory of a worker and its parent
between a tenth and the end of an epoch, which touches every entry of the list.
"""

import argparse
import os
import pickle
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_name, link_images, spread, write_result
from util import errors
from util.command_line import Parser
from util.data import transforms
from util.data.archives import ImagePath
from util.data.datasets import Images
from util.data.images import PixelSpec, load_array
from util.data.loaders import Loading, train_loader
from util.data.splits import DataSpec

CPU = torch.device("cpu")
SCALE = (0.2, 1.0)  # pre-training's
FINETUNE_SCALE = (0.08, 1.0)
POLICY = "rand-m9-mstd0.5-inc1"
REPROB = 0.25


class Decoded(Dataset):
    """Dataset that decodes an image and returns no more than its height."""

    def __init__(self, images: Images) -> None:
        """Take over the list of files of another dataset."""
        self.samples = images.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        return load_array(self.samples[index][0]).shape[0]


def finetune_transform(size: int, aa: str) -> transforms.FinetuneTransform:
    """Create the scripts' augmentation of fine-tuning with the policy `aa`, otherwise as published."""
    return transforms.FinetuneTransform(size, FINETUNE_SCALE, None, aa, REPROB, "pixel", 1)


def classic_transforms(size: int) -> tuple[tv.Compose, tv.Compose]:
    """Create the usual transforms of Pillow's images for pre-training and for fine-tuning, to size x size pixels."""
    pretrain = tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=SCALE, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(PixelSpec().mean, PixelSpec().std),
        ]
    )
    finetune = create_transform(
        size,
        is_training=True,
        scale=FINETUNE_SCALE,
        color_jitter=None,
        auto_augment=POLICY,
        interpolation="bicubic",
        re_prob=REPROB,
        re_mode="pixel",
    )
    transforms.replace_posterize(finetune)
    return pretrain, finetune


def pack(folder: Path, packed: Path, per_archive: int = 1000) -> None:
    """Pack the files of class folders into archives packed/N.tar of so many files each."""
    packed.mkdir(parents=True)
    files = sorted(folder.glob("*/*"))
    for start in range(0, len(files), per_archive):
        with tarfile.open(packed / f"{start:07d}.tar", "w", dereference=True) as archive:
            for file in files[start : start + per_archive]:
                archive.add(file, f"{file.parent.name}/{file.name}")


def build_loaders(folder: Path, batch_size: int, workers: int, size: int) -> dict[str, DataLoader]:
    """Build the loader of each row of the first table.

    Args:
        folder: Folder that holds train/<class>/ and packed/train/*.tar.
        batch_size: Images per batch.
        workers: Number of loader processes; 0: none but this one.
        size: Height and width of the batches' images in pixels.
    """
    loading = Loading(batch_size, workers, True, 0, CPU)
    common = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0}

    def scripts(transform: Callable, place: Path = folder) -> DataLoader:
        return train_loader(DataSpec(str(place)), transform, PixelSpec(), loading).loader

    def usual(dataset: Dataset) -> DataLoader:
        return DataLoader(dataset, shuffle=True, drop_last=True, **common)

    ours = scripts(transforms.Crop(size, SCALE))
    pretrain, finetune = classic_transforms(size)
    return {
        "classic": usual(ImageFolder(f"{folder}/train", pretrain)),
        "ours": ours,
        "tar": scripts(transforms.Crop(size, SCALE), folder / "packed"),
        "decode": usual(Decoded(ours.dataset.images)),
        "finetune_classic": usual(ImageFolder(f"{folder}/train", finetune)),
        "finetune_ours": scripts(finetune_transform(size, POLICY)),
        "finetune_no_aa": scripts(finetune_transform(size, "none")),
    }


def own_classic(name: str) -> str:
    """Return the name of the classic row that a row is compared with."""
    return "finetune_classic" if name.startswith("finetune_") else "classic"


def median_ratio(rates: list[float], others: list[float]) -> float:
    """Return the median of the ratios of two rows' rates, repetition by repetition."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def measure_speed(rows: dict[str, DataLoader], workers: int, repeat: int) -> list[dict]:
    """Measure the rows of the first table by turns.

    Args:
        rows: The loader of each row.
        workers: Number of loader processes that they have.
        repeat: Number of measured repetitions.
    """
    # The first repetition starts the loader processes and fills the page cache; it is not counted.
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for repetition in range(-1, repeat):
        for name, loader in rows.items():
            start = time.perf_counter()
            for _ in loader:
                pass
            if repetition >= 0:
                rates[name].append(len(loader) * loader.batch_size / (time.perf_counter() - start))

    return [
        {
            "name": name,
            "workers": workers,
            "images_per_s": statistics.median(values),
            "spread": spread(values),
            "all": values,
        }
        for name, values in rates.items()
    ]


def memory_of(*pids: int) -> int:
    """Return the bytes of memory that the processes hold together; a page that they share counts once."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(1024 * int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1]) for rollup in rollups)


def make_files(root: Path, files: int, packed: bool) -> None:
    """Make a split of so many empty files in root: train/<class>/, or train.tar."""
    names = [f"n{number // 1000:08d}/n{number // 1000:08d}_{number % 1000:05d}.JPEG" for number in range(files)]
    if packed:
        with (root / "train.tar").open("wb") as archive:
            for name in names:
                archive.write(tarfile.TarInfo(name).tobuf())
            archive.write(bytes(tarfile.RECORDSIZE))
        return
    for number, name in enumerate(names):
        if number % 1000 == 0:
            (root / "train" / name).parent.mkdir(parents=True)
        (root / "train" / name).touch()


def read_without_decoding(path: str | ImagePath) -> np.ndarray:
    """Read a file, and return a small image in place of what is in it, since the files are empty."""
    (Path(path) if isinstance(path, str) else path).read_bytes()
    return np.zeros((8, 8, 3), np.uint8)


def measure_listing(files: int, packed: bool) -> dict[str, float]:
    """Measure a row of the second table.

    Args:
        files: Number of files.
        packed: They lie in an archive, not in folders.

    Returns:
        The number of files, whether they are packed, the seconds until they are listed (start_s), the bytes of the list
        per file, and the growth of memory (growth_mb).
    """
    with tempfile.TemporaryDirectory() as temporary:
        make_files(Path(temporary), files, packed)

        # Opening the loader lists them.
        start = time.perf_counter()
        transform = transforms.Crop(8, SCALE)
        loader = train_loader(DataSpec(temporary), transform, PixelSpec(), Loading(500, 1, False, 0, CPU))
        took = time.perf_counter() - start

        # After a tenth of an epoch everything is imported; from there on memory grows only by what touching the list
        # costs.
        images = loader.dataset.images
        images.loader, sizes = read_without_decoding, []
        for batch, _ in enumerate(loader, 1):
            if batch in (len(loader) // 10, len(loader)):
                sizes.append(memory_of(os.getpid(), loader.loader._iterator._workers[0].pid))
    per_file = len(pickle.dumps(images.listing)) / files
    growth = (sizes[1] - sizes[0]) / 1e6
    return {"files": files, "packed": packed, "start_s": took, "bytes_per_file": per_file, "growth_mb": growth}


def get_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data_path", type=Path, required=True, help="folder that holds train/<class>/*.jpg")
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--input_size", default=224, type=int, help="height and width of the batches' images in pixels")
    parser.add_argument(
        "--workers",
        default=len(os.sched_getaffinity(0)),
        type=int,
        help="loader processes; by default a process per core",
    )
    parser.add_argument("--images", default=1280, type=int, help="smallest number of images per repetition")
    parser.add_argument("--repeat", default=7, type=int, help="number of repetitions")
    numbers = [10**4, 10**5, 10**6]
    parser.add_argument("--files", default=numbers, type=int, nargs="*", help="numbers of files in the second table")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    return parser.parse_args()


def main() -> None:
    """Measure both tables, print them, and write the JSON file."""
    args = get_args()

    # The first table: without loader processes, and with them.
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        link_images(args.data_path / "train", folder / "train", args.images)
        pack(folder / "train", folder / "packed" / "train")
        for workers in (0, args.workers):
            loaders = build_loaders(folder, args.batch_size, workers, args.input_size)
            rows += measure_speed(loaders, workers, args.repeat)
    print(f"n = {args.repeat}, batch {args.batch_size}; {device_name(CPU)}; torch {torch.__version__}")
    print(f"{'':16} {'workers':>7} {'images/s':>9} {'spread':>7} {'of classic':>10} {'of decode':>9}")
    for row in rows:
        same = {other["name"]: other["all"] for other in rows if other["workers"] == row["workers"]}
        classic, decode = (median_ratio(row["all"], same[name]) for name in (own_classic(row["name"]), "decode"))
        print(
            f"{row['name']:16} {row['workers']:7} {row['images_per_s']:9.0f} {row['spread']:7.1%} {classic:10.2f} "
            f"{decode:9.0%}"
        )

    # The second table.
    costs = [measure_listing(files, packed) for files in args.files for packed in (False, True)]
    for cost in costs:
        print("  ".join(f"{name}: {value:.4g}" for name, value in cost.items()), flush=True)
    write_result(args.json, {"rows": rows, "listing": costs, "n": args.repeat})


if __name__ == "__main__":
    errors.run(main)

"""How fast images are fed: the classic pipeline, ours, and decoding alone, by turns; what a long list of files costs.

    python benchmarks/loader.py --data_path FOLDER --json loader.json     FOLDER/train/<class>/*.jpg, photographs

The rows, pre-training's augmentation (crop of 0.2 to 1, 224 pixels, flip), one thread per process:
    classic    ImageFolder, Pillow, RandomResizedCrop (bicubic), flip, ToTensor, Normalize
    ours       the scripts' loader up to the batch of bytes that goes to the device, which normalises it
    decode     files to arrays of pixels by the scripts' decoder, and nothing else: the floor
Every repetition runs each row once over the folder, linked often enough for --images; medians of --repeat, after one
that warms up. The second table is of synthetic folders of empty files, 1,000 to a class: the start, which lists them,
and the growth of the memory of a worker and its parent from a tenth to the end of an epoch, which touches every entry.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import device_name, link_images
from util.data import transforms
from util.data.datasets import Images
from util.data.images import Pixels, load_array
from util.data.loaders import Loading, train_loader

CPU = torch.device("cpu")
SCALE = (0.2, 1.0)


class Decoded(Dataset):
    """Decodes and forgets."""

    def __init__(self, images: Images) -> None:
        self.samples = images.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        return load_array(self.samples[index][0]).shape[0]


def loaders(folder: str, batch_size: int, workers: int) -> dict[str, DataLoader]:
    """The rows' loaders."""
    ours = train_loader(folder, transforms.Crop(224, SCALE), Pixels(), Loading(batch_size, workers, True, 0, CPU))
    classic = tv.Compose(
        [
            tv.RandomResizedCrop(224, scale=SCALE, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(Pixels().mean, Pixels().std),
        ]
    )
    common = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0, "shuffle": True}
    return {
        "classic": DataLoader(ImageFolder(f"{folder}/train", classic), drop_last=True, **common),
        "ours": ours.loader,
        "decode": DataLoader(Decoded(ours.dataset.images), drop_last=True, **common),
    }


def speeds(folder: str, batch_size: int, workers: int, repeat: int) -> list[dict]:
    """The rows of the table for this number of workers."""
    rows = loaders(folder, batch_size, workers)
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for repetition in range(-1, repeat):
        for name, loader in rows.items():
            start = time.perf_counter()
            for _ in loader:
                pass
            if repetition >= 0:
                rates[name].append(len(loader) * batch_size / (time.perf_counter() - start))
    return [
        {
            "name": name,
            "workers": workers,
            "images_per_s": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "all": values,
        }
        for name, values in rates.items()
    ]


def memory(*pids: int) -> int:
    """Bytes that these processes hold together; what they share counts once."""
    return sum(
        1024 * int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])
        for pid in pids
    )


def listing_costs(files: int) -> dict[str, float]:
    """Start-up and memory for a folder of so many empty files."""
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(files // 1000):
            folder = Path(temporary) / "data" / "train" / f"n{number:08d}"
            folder.mkdir(parents=True)
            for image in range(1000):
                (folder / f"n{number:08d}_{image:05d}.JPEG").touch()
        start = time.perf_counter()
        transform = transforms.Crop(8, SCALE)
        feed = train_loader(f"{temporary}/data", transform, Pixels(), Loading(500, 1, False, 0, CPU))
        took = time.perf_counter() - start
        feed.dataset.images.loader = lambda path: np.zeros((8, 8, 3), np.uint8)
        sizes = []
        for batch, _ in enumerate(feed, 1):
            if batch in (len(feed) // 10, len(feed)):  # when everything is imported, and at the end
                sizes.append(memory(os.getpid(), feed.loader._iterator._workers[0].pid))
    return {"files": files, "start_s": took, "growth_mb": (sizes[1] - sizes[0]) / 1e6}


def main() -> None:
    """Measure, print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="holds train/<class>/ with photographs")
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=int, help="default: all cores")
    parser.add_argument("--images", default=1280, type=int, help="per repetition")
    parser.add_argument("--repeat", default=7, type=int)
    parser.add_argument("--files", default=[10**4, 10**5, 10**6], type=int, nargs="*", help="of the second table")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        link_images(args.data_path / "train", Path(temporary) / "train", args.images)
        rows = [row for n in (0, args.workers) for row in speeds(temporary, args.batch_size, n, args.repeat)]
    print(f"n = {args.repeat}, batch {args.batch_size}; {device_name(CPU)}; torch {torch.__version__}")
    print(f"{'':8} {'workers':>7} {'images/s':>9} {'spread':>7} {'of classic':>10} {'of decode':>9}")
    for row in rows:
        same = {other["name"]: other["images_per_s"] for other in rows if other["workers"] == row["workers"]}
        rate = row["images_per_s"]
        print(
            f"{row['name']:8} {row['workers']:7} {rate:9.0f} {row['spread']:7.1%} {rate / same['classic']:10.2f} "
            f"{rate / same['decode']:9.1%}"
        )
    costs = [listing_costs(files) for files in args.files]
    for cost in costs:
        print("  ".join(f"{name}: {value:.4g}" for name, value in cost.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "listing": costs, "n": args.repeat}, indent=1) + "\n")


if __name__ == "__main__":
    main()

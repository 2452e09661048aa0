"""Small datasets in the folders that the scripts read: output/{train,val}/<class>/<images>.

    python scripts/prepare_data.py fashion_mnist --output data/fashion_mnist
    python scripts/prepare_data.py cifar10 --output data/cifar10
    python scripts/prepare_data.py imagenette --output data/imagenette

They are downloaded by torchvision, checked, next to the output. Without a network give --source: for fashion_mnist the
folder of its four idx.gz files (Debian: apt-get install dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist), for the others a folder or an archive that holds train/<class>/ and val/<class>/.
What is there already, and whole, is left alone; where other files lie in output/train or val, nothing is done.
--per_class N keeps the first N of each class: the samples are `fashion_mnist --per_class 200`.
"""

import argparse
import gzip
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors
from util.data.datasets import is_image
from util.errors import UserError

COUNTS = {"fashion_mnist": (60000, 10000), "cifar10": (50000, 10000), "imagenette": (9469, 3925)}
CLOTHES = ["tshirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"]
IDX = {"train": "train", "val": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """An idx.gz file of unsigned bytes as an array: magic (2 zero bytes, type 8, number of axes), sizes, values."""
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:3] != b"\x00\x00\x08":
            raise ValueError("it is no idx file of unsigned bytes")
        sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def clothes(source: Path, split: str) -> Iterator[tuple[str, int, np.ndarray]]:
    """(class, number in the source, pixels [28, 28]) of Fashion-MNIST."""
    images = read_idx(source / f"{IDX[split]}-images-idx3-ubyte.gz")  # [N, 28, 28]
    labels = read_idx(source / f"{IDX[split]}-labels-idx1-ubyte.gz")  # [N]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield CLOTHES[label], number, image


def cifar(downloaded: Path, split: str) -> Iterator[tuple[str, int, np.ndarray]]:
    """(class, number in the source, pixels [32, 32, 3]) of CIFAR-10 as torchvision has it."""
    dataset = datasets.CIFAR10(downloaded, train=split == "train")
    for number, (image, label) in enumerate(zip(dataset.data, dataset.targets, strict=True)):
        yield dataset.classes[label], number, image


def write(samples: Iterator[tuple[str, int, np.ndarray]], folder: Path, per_class: int | None) -> None:
    """Each as folder/<class>/<number>.png."""
    written: dict[str, int] = {}
    for name, number, pixels in samples:
        if per_class is None or written.get(name, 0) < per_class:
            written[name] = written.get(name, 0) + 1
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number:05d}.png", optimize=per_class is not None)


def copy(source: Path, folder: Path, split: str, per_class: int | None) -> None:
    """source/<split>/<class>/<images>, wherever in source it lies."""
    places = sorted(path for path in source.rglob(split) if path.is_dir())
    if not places:
        raise UserError(f"{source} holds no folder {split}/<class>/")
    for entry in sorted(path for path in places[0].iterdir() if path.is_dir()):
        (folder / entry.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(path for path in entry.iterdir() if is_image(path.name))[:per_class]:
            shutil.copyfile(file, folder / entry.name / file.name)


def fetch(name: str, place: Path) -> Path:
    """Download by torchvision; returns what to read from."""
    try:
        if name == "fashion_mnist":
            datasets.FashionMNIST(place, download=True)
            return place / "FashionMNIST" / "raw"
        if name == "cifar10":
            datasets.CIFAR10(place, download=True)
            return place
        datasets.Imagenette(place, size="160px", download=not (place / "imagenette2-160").exists())
        return place / "imagenette2-160"
    except (OSError, RuntimeError) as error:  # no network
        raise UserError(f"cannot download {name}: {str(error).splitlines()[0]}. Give --source (see --help)") from error


def counted(output: Path) -> tuple[int, int]:
    """Images in train/ and val/."""
    return tuple(sum(is_image(path.name) for path in (output / split).glob("*/*")) for split in IDX)


def prepare(
    name: str, source: Path, output: Path, per_class: int | None, downloaded: bool, wanted: tuple[int, int]
) -> None:
    """Write both splits, of so many images, all or nothing."""
    given = source
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        done = Path(temporary) / "done"
        if source.is_file():
            try:
                with tarfile.open(source) as tar:
                    tar.extractall(f"{temporary}/source", filter="data")
            except tarfile.TarError as error:
                raise UserError(f"{source}: {error}") from error
            source = Path(temporary) / "source"
        for split in IDX:
            folder = done / split
            if name == "fashion_mnist":
                write(clothes(source, split), folder, per_class)
            elif name == "cifar10" and downloaded:
                write(cifar(source, split), folder, per_class)
            else:
                copy(source, folder, split, per_class)
        found = counted(done)
        if found != wanted:
            raise UserError(f"{given} holds {found[0]} and {found[1]} images, {wanted[0]} and {wanted[1]} wanted")
        for split in IDX:
            for path in (output / split).rglob("*"):
                if not (done / path.relative_to(output)).exists():
                    raise UserError(f"{path} is not among what would be written: remove it, or choose another --output")
        output.mkdir(exist_ok=True)
        for split in IDX:
            shutil.rmtree(output / split, ignore_errors=True)
            (done / split).rename(output / split)


def main(argv: list[str] | None = None) -> None:
    """Prepare one dataset (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(COUNTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--per_class", type=int)
    args = parser.parse_args(argv)
    if args.source and not args.source.exists():
        raise UserError(f"--source {args.source}: no such file or folder")
    wanted = COUNTS[args.name] if args.per_class is None else (10 * args.per_class,) * 2
    if args.per_class is not None and args.per_class < 1:
        raise UserError(f"--per_class {args.per_class} must be at least 1")
    if counted(args.output) != wanted:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        source = args.source or fetch(args.name, args.output.with_name(f"{args.output.name}_download"))
        prepare(args.name, source, args.output, args.per_class, args.source is None, wanted)
    print(f"{args.output}: {wanted[0]} training images, {wanted[1]} others")


if __name__ == "__main__":
    errors.run(main)

"""Prepare a small dataset as the folders that training reads: output/{train,val}/<class>/<images>.

    python scripts/prepare_data.py fashion_mnist --output data/fashion_mnist
    python scripts/prepare_data.py cifar10 --output data/cifar10
    python scripts/prepare_data.py imagenette --output data/imagenette

The dataset is downloaded and checked by torchvision, into a folder next to the output. Without a network pass --source:
for fashion_mnist the folder of its four idx.gz files (Debian: apt-get install dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist), for the others a folder or an archive that holds train/<class>/ and val/<class>/.

An output that is complete is left alone. If output/train or output/val holds files that do not belong to the dataset,
nothing is written. --per_class N keeps the first N images of each class: the samples in samples/fashion_mnist are
`fashion_mnist --per_class 200`.
"""

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
from util.command_line import Parser
from util.data.listing import exists
from util.data.splits import SPLITS, is_image
from util.disk import UNFINISHED
from util.errors import UserError
from util.packing.sources import DAMAGE

# Images in train/ and val/ of each dataset.
COUNTS = {"fashion_mnist": (60000, 10000), "cifar10": (50000, 10000), "imagenette": (9469, 3925)}
FASHION_CLASSES = (
    *("tshirt_top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
IDX_PREFIXES = {"train": "train", "val": "t10k"}  # of Fashion-MNIST's file names, by split

Sample = tuple[str, int, np.ndarray]  # class, number in the source, pixels [H, W] or [H, W, 3] of 8 bits


def read_idx(path: Path) -> np.ndarray:
    """Read an idx.gz file of unsigned bytes as an array.

    The format: two zero bytes, the type (8: unsigned bytes), the number of axes, the size of each axis in 4 bytes with
    the highest first, and the values.

    Raises:
        UserError: The file cannot be read, or is of another format.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        if len(data) < 4 or data[:3] != b"\x00\x00\x08":
            raise ValueError("it is no idx file of unsigned bytes")
        num_axes = data[3]
        sizes = np.frombuffer(data, ">i4", count=num_axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(sizes)
    except DAMAGE as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_fashion_mnist(source: Path, split: str) -> Iterator[Sample]:
    """Yield the samples of a split of Fashion-MNIST, pixels [28, 28], from the folder of its idx.gz files.

    Raises:
        UserError: A file cannot be read, or is not that of Fashion-MNIST.
    """
    names = [f"{IDX_PREFIXES[split]}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    images, labels = (read_idx(source / name) for name in names)  # [N, 28, 28], [N]
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or (labels >= len(FASHION_CLASSES)).any():
        raise UserError(
            f"{source / names[0]} of shape {list(images.shape)} and {names[1]} of shape {list(labels.shape)} are not "
            f"Fashion-MNIST's, images of 28 x 28 pixels with a label from 0 to 9 each: give the folder of its own files"
        )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield FASHION_CLASSES[label], number, image


def read_cifar10(source: Path, split: str) -> Iterator[Sample]:
    """Yield the samples of a split of CIFAR-10, pixels [32, 32, 3], from torchvision's download folder."""
    dataset = datasets.CIFAR10(source, train=split == "train")
    for number, (image, label) in enumerate(zip(dataset.data, dataset.targets, strict=True)):
        yield dataset.classes[label], number, image


def write(samples: Iterator[Sample], folder: Path, per_class: int | None) -> None:
    """Write samples to folder/<class>/<number>.png.

    Args:
        samples: Images of one split.
        folder: Folder of the split.
        per_class: Number of images to write of each class, compressed as far as PNG goes; None: all.
    """
    written: dict[str, int] = {}
    for name, number, pixels in samples:
        if per_class is not None and written.get(name, 0) >= per_class:
            continue
        written[name] = written.get(name, 0) + 1
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number:05d}.png", optimize=per_class is not None)


def copy(source: Path, folder: Path, split: str, per_class: int | None) -> None:
    """Copy the images of a split that lies as <split>/<class>/<images> somewhere in the source.

    Args:
        source: Folder to search.
        folder: Folder of the split to write.
        split: "train" or "val".
        per_class: Number of images to copy of each class; None: all.

    Raises:
        UserError: The source does not hold the split.
    """
    candidates = sorted(path for path in source.rglob(split) if path.is_dir())
    if not candidates:
        raise UserError(f"{source} holds no folder {split}/<class>/: give a --source with train/ and val/")
    for class_folder in sorted(path for path in candidates[0].iterdir() if path.is_dir()):
        (folder / class_folder.name).mkdir(parents=True, exist_ok=True)
        images = sorted(path for path in class_folder.iterdir() if is_image(path.name))
        for image in images[:per_class]:
            shutil.copyfile(image, folder / class_folder.name / image.name)


def fetch(name: str, folder: Path) -> Path:
    """Download a dataset with torchvision and return the folder to read it from.

    Raises:
        UserError: The download failed.
    """
    try:
        if name == "fashion_mnist":
            datasets.FashionMNIST(folder, download=True)
            return folder / "FashionMNIST" / "raw"
        if name == "cifar10":
            datasets.CIFAR10(folder, download=True)
            return folder
        datasets.Imagenette(folder, size="160px", download=not (folder / "imagenette2-160").exists())
        return folder / "imagenette2-160"
    except (OSError, RuntimeError) as error:  # no network
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot download {name}: {reason}. Give --source (see --help)") from error


def count_images(output: Path) -> tuple[int, int]:
    """Return the number of images in train/ and in val/."""
    return tuple(sum(is_image(path.name) for path in (output / split).glob("*/*")) for split in SPLITS)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive into a folder.

    Raises:
        UserError: The file is no tar archive, is damaged or cut off, or the disk is full.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except DAMAGE as error:
        raise UserError(f"cannot unpack {archive}: {error}") from error


def replace_splits(new: Path, output: Path) -> None:
    """Put new/train and new/val in the place of those of the output, which go to new/replaced.

    Raises:
        UserError: The output holds something that is not in the new folders, and would be lost.
    """
    for split in SPLITS:
        for path in (output / split).rglob("*"):
            if not (new / path.relative_to(output)).exists():
                raise UserError(f"{path} does not belong to the dataset: remove it, or choose another --output")
    (new / "replaced").mkdir()
    output.mkdir(exist_ok=True)
    for split in SPLITS:
        if (output / split).exists():
            (output / split).rename(new / "replaced" / split)
        (new / split).rename(output / split)


def prepare(
    name: str, source: Path, output: Path, per_class: int | None, downloaded: bool, expected: tuple[int, int]
) -> None:
    """Make a dataset's train/ and val/ folders from its source; write nothing if images are missing.

    Args:
        name: Dataset, one of COUNTS.
        source: Folder or archive to read.
        output: Folder to write.
        per_class: Number of images to keep of each class; None: all.
        downloaded: The source is a download of torchvision's.
        expected: Number of training and of validation images that must result.

    Raises:
        UserError: The source cannot be read or is not complete, or the output holds other files.
    """
    # Everything is written on the output's file system first, where moving it at the end is instant: inside the output
    # if that is there, since it may be a disk of its own.
    place = output if output.exists() else output.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=UNFINISHED) as temporary:
        folder = source
        if source.is_file():
            folder = Path(temporary) / "source"
            unpack(source, folder)

        new = Path(temporary) / "new"
        for split in SPLITS:
            if name == "fashion_mnist":
                write(read_fashion_mnist(folder, split), new / split, per_class)
            elif name == "cifar10" and downloaded:
                write(read_cifar10(folder, split), new / split, per_class)
            else:
                copy(folder, new / split, split, per_class)

        counts = count_images(new)
        if counts != expected:
            remedy = f"remove {source} to download it again" if downloaded else "is it complete?"
            if per_class is not None:
                remedy = f"has each class {per_class} images? Lower --per_class"
            raise UserError(
                f"{source} holds {counts[0]} training and {counts[1]} validation images instead of {expected[0]} and "
                f"{expected[1]}: {remedy}"
            )
        replace_splits(new, output)


def main(argv: list[str] | None = None) -> None:
    """Prepare one dataset (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    parser.add_argument("name", choices=list(COUNTS), help="dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", type=Path, help="folder or archive to read; default: download")
    parser.add_argument("--per_class", type=int, help="number of images to keep of each class; default: all")
    args = parser.parse_args(argv)
    if args.source and not exists(args.source):
        raise UserError(f"--source {args.source}: no such file or folder")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file: name a folder")
    if args.per_class is not None and args.per_class < 1:
        raise UserError(f"--per_class {args.per_class} must be at least 1")

    # All three datasets have ten classes. What is complete already is not written again.
    expected = COUNTS[args.name] if args.per_class is None else (10 * args.per_class,) * 2
    if count_images(args.output) != expected:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        source = args.source or fetch(args.name, args.output.with_name(f"{args.output.name}_download"))
        prepare(args.name, source, args.output, args.per_class, args.source is None, expected)
    print(f"{args.output}: {expected[0]} training images, {expected[1]} others")


if __name__ == "__main__":
    errors.run(main)

"""ImageNet-1k from its archives into the folders that the scripts read.

    python scripts/prepare_imagenet.py --output imagenet --train ILSVRC2012_img_train.tar \
        --val ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz

The archives come from image-net.org, after registration. The validation images have no classes in their names; --labels
says which are whose: the development kit (needs `pip install scipy`, for its MATLAB file), Kaggle's
LOC_val_solution.csv, or a text file with one class (n01440764 ...) per line in the order of the images. --val may also
be a folder that holds the images, flat. What is there already is left alone, so that a run that was cut off goes on.

output/train/<class>/*.JPEG     1,281,167 images
output/val/<class>/*.JPEG       50 of each of 1,000 classes
"""

import argparse
import csv
import io
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors
from util.errors import UserError

CLASSES, PER_CLASS = 1000, 50
NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
CLASS = re.compile(r"n\d{8}")


def read_labels(path: Path) -> list[str]:
    """The class of validation image 1, 2, ... Raises UserError for a file that is none of the three kinds."""
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _devkit(path)
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        rows = {int(NAME.match(row["ImageId"])[1]): row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
        return [rows[number] for number in sorted(rows)]
    return [line.strip() for line in lines if line.strip()]


def _devkit(path: Path) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} holds a MATLAB file: pip install scipy, or give other --labels") from None
    with tarfile.open(path) as tar:
        files = {Path(member.name).name: member for member in tar if member.isfile()}
        meta = loadmat(io.BytesIO(tar.extractfile(files["meta.mat"]).read()), squeeze_me=True)["synsets"]
        truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read().split()
    classes = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in meta}
    return [classes[int(number)] for number in truth]


def put(target: Path, size: int, write: Callable[[Path], object]) -> bool:
    """Write a file unless it is there with this size; whole or not at all. Returns whether it was written."""
    if target.exists() and target.stat().st_size == size:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.part")
    write(temporary)
    temporary.replace(target)
    return True


def save(file: IO[bytes], target: Path) -> None:
    """Copy an open file."""
    with target.open("wb") as out:
        shutil.copyfileobj(file, out)


def images(source: Path) -> Iterator[tuple[str, int, Callable[[Path], object]]]:
    """(name, bytes, how to write it) of each validation image of an archive or a folder."""
    if source.is_dir():
        for path in sorted(source.glob("*.JPEG")):
            yield path.name, path.stat().st_size, lambda target, path=path: _link(path, target)
        return
    with tarfile.open(source) as tar:
        for member in tar:
            if member.isfile():
                yield Path(member.name).name, member.size, lambda target, m=member: save(tar.extractfile(m), target)


def _link(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def prepare_val(source: Path, labels: list[str], output: Path) -> None:
    """Sort the validation images into output/val/<class>/. Raises UserError unless 50 of each class end there."""
    expected, wrong = Counter(labels), [label for label in labels if not CLASS.fullmatch(label)]
    if wrong or len(expected) != CLASSES or set(expected.values()) != {PER_CLASS}:
        raise UserError(
            f"--labels: {PER_CLASS} images of each of {CLASSES} classes wanted, found {len(labels)} of {len(expected)}"
            + (f"; {wrong[0]!r} is no class" if wrong else "")
        )
    written = 0
    for name, size, write in images(source):
        if match := NAME.match(name):
            written += put(output / "val" / labels[int(match[1]) - 1] / name, size, write)
    there = {label: len(list((output / "val" / label).glob("*.JPEG"))) for label in expected}
    bad = {label: count for label, count in there.items() if count != PER_CLASS}
    strange = sorted({path.name for path in (output / "val").glob("*") if path.is_dir()} - set(expected))
    if bad or strange:
        raise UserError(
            f"{output / 'val'} must hold {PER_CLASS} images of each class: {len(bad)} classes differ "
            f"{dict(list(bad.items())[:3])}, folders of no class: {strange[:3]}. Is {source} whole, and the folder new?"
        )
    print(f"{output / 'val'}: {PER_CLASS} images of each of {CLASSES} classes, {written} written now")


def prepare_train(source: Path, output: Path) -> None:
    """Unpack the archive of one archive per class into output/train/<class>/."""
    written = total = classes = 0
    with tarfile.open(source) as outer:
        for inner in outer:
            if not CLASS.fullmatch(Path(inner.name).stem):
                raise UserError(f"{source} holds {inner.name}: n01440764.tar and the like wanted")
            classes += 1
            with tarfile.open(fileobj=outer.extractfile(inner)) as tar:
                for member in tar:
                    target = output / "train" / Path(inner.name).stem / Path(member.name).name
                    written += put(target, member.size, lambda path, m=member, tar=tar: save(tar.extractfile(m), path))
                    total += 1
    if classes != CLASSES:
        raise UserError(f"{source} holds {classes} classes, {CLASSES} wanted: is it whole?")
    print(f"{output / 'train'}: {total} images of {classes} classes, {written} written now")


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=Path, metavar="TAR")
    parser.add_argument("--val", type=Path, metavar="TAR_OR_FOLDER")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="needed with --val")
    args = parser.parse_args(argv)
    if not args.train and not args.val:
        raise UserError("--train, --val or both are needed")
    if args.val and not args.labels:
        raise UserError("--val needs --labels: the development kit, LOC_val_solution.csv or a list of classes")
    for path in filter(None, (args.train, args.val, args.labels)):
        if not path.exists():
            raise UserError(f"{path}: no such file")
    try:
        if args.val:
            prepare_val(args.val, read_labels(args.labels), args.output)
        if args.train:
            prepare_train(args.train, args.output)
    except (tarfile.TarError, EOFError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"an archive or the labels cannot be read: {type(error).__name__} {error}") from error
    except OSError as error:
        raise UserError(f"{error}: is the disk full?") from error


if __name__ == "__main__":
    errors.run(main)

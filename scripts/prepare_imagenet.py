r"""Unpack ImageNet-1k from its archives into the folders that training reads, or pack it into shards.

    python scripts/prepare_imagenet.py --output imagenet --train ILSVRC2012_img_train.tar \
        --val ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz

The archives come from image-net.org, after registration. The validation images have no classes in their names; --labels
gives them: the development kit (needs `pip install scipy`, for its MATLAB file), Kaggle's LOC_val_solution.csv, or a
text file with one class (n01440764 ...) per line in the order of the images. --val may also be a folder that holds the
images, without subfolders. Files that are there already are left alone, so that an interrupted run can be resumed.

output/train/<class>/*.JPEG     1,281,167 images
output/val/<class>/*.JPEG       50 of each of 1,000 classes

With --packed no single image is written: output/train/shard-00000.tar and so on hold the same <class>/*.JPEG, in tar
archives of 1 GB that training reads in place, and so do those in output/val.
"""

import csv
import gzip
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tqdm import tqdm

from util import errors
from util.command_line import Parser
from util.data.archive_index import load_index
from util.data.archives import open_archive
from util.data.listing import exists
from util.data.splits import ARCHIVE, is_image
from util.errors import UserError
from util.packing.shards import SHARD_SIZE, PackedImages
from util.packing.sources import readable
from util.packing.streams import StrictInfo
from util.packing.writing import pack_split

CLASSES, PER_CLASS = 1000, 50
NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
CLASS = re.compile(r"n\d{8}")

WriteFile = Callable[[Path], None]  # writes one file to this path
Place = tuple[Path, int, int]  # a file, where in it the bytes of an image begin, and their number


def read_labels(path: Path) -> list[str]:
    """Return the classes of validation images 1, 2, ... from any of the three kinds of files.

    Nothing is checked: any text file's lines come back as classes, which `prepare_val` checks. A broken archive or CSV
    ends in an error of any kind, of which `open_labels` makes a message.

    Raises:
        UserError: The file is the development kit, and scipy is missing.
    """
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _read_devkit(path)
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        labels = {}
        for row in csv.DictReader(lines):
            number = int(NAME.match(row["ImageId"])[1])
            labels[number] = row["PredictionString"].split()[0]  # the class, before its bounding boxes
        return [labels[number] for number in sorted(labels)]
    return [line.strip() for line in lines if line.strip()]


def open_labels(path: Path) -> list[str]:
    """Read labels as `read_labels` does.

    Raises:
        UserError: The file is damaged, holds something else, or needs a package that is missing.
    """
    try:
        return read_labels(path)
    except UserError:
        raise
    except Exception as error:  # whatever tarfile, gzip, csv and scipy raise at a file that is none of theirs
        raise UserError(
            f"--labels {path} cannot be read ({type(error).__name__}: {error}): give the development kit, "
            "LOC_val_solution.csv or a list of classes"
        ) from error


def _read_devkit(path: Path) -> list[str]:
    """Read the validation images' classes from the development kit, whose numbers meta.mat translates."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} holds a MATLAB file: pip install scipy, or give other --labels") from None
    with tarfile.open(path) as tar:
        files = {Path(member.name).name: member for member in tar if member.isfile()}
        synsets = loadmat(io.BytesIO(tar.extractfile(files["meta.mat"]).read()), squeeze_me=True)["synsets"]
        truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read().split()
    classes = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
    return [classes[int(number)] for number in truth]


def write_if_missing(target: Path, size: int, write: WriteFile) -> bool:
    """Write a file, all or nothing, unless it exists with this size.

    Args:
        target: File to write; its folder is created.
        size: Bytes that the complete file has.
        write: Writes the file to the path that it is called with.

    Returns:
        Whether the file was written.
    """
    if target.exists() and target.stat().st_size == size:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.part")
    write(temporary)
    temporary.replace(target)
    return True


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(tar.extractfile(member), out)


def _link(path: Path, target: Path) -> None:
    """Make target a hard link to a file, which takes no space, or a copy where the file system cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def validation_images(source: Path) -> Iterator[tuple[str, int, WriteFile]]:
    """Yield (name, size in bytes, function that writes it) of each file of an archive, or each *.JPEG of a folder.

    Call the function before the iteration ends: the archive is closed then.
    """
    if source.is_dir():
        for path in sorted(source.glob("*.JPEG")):
            yield path.name, path.stat().st_size, partial(_link, path)
        return
    with tarfile.open(source) as tar:
        for member in tar:
            if member.isfile():
                yield Path(member.name).name, member.size, partial(_extract, tar, member)


def count_labels(labels: list[str]) -> Counter:
    """Return the number of validation images of each class.

    Raises:
        UserError: The labels do not name 50 images of each of 1,000 classes.
    """
    expected = Counter(labels)
    invalid = [label for label in labels if not CLASS.fullmatch(label)]
    if invalid or len(expected) != CLASSES or set(expected.values()) != {PER_CLASS}:
        raise UserError(
            f"--labels must name {PER_CLASS} images of each of {CLASSES} classes, but names {len(labels)} images of "
            f"{len(expected)} classes"
            + (f"; {invalid[0]!r} is no class like n01440764" if invalid else "")
            + ": give the labels of the ILSVRC2012 validation images"
        )
    return expected


def class_of(name: str, labels: list[str]) -> str | None:
    """Return the class of a validation image by its file name, which holds its number; None for any other file."""
    match = NAME.match(name)
    number = int(match[1]) if match else 0
    return labels[number - 1] if 1 <= number <= len(labels) else None


def _refuse_archives(folder: Path) -> None:
    """Raise a UserError if a folder holds archives, beside which class folders could not be read."""
    if any(folder.glob(f"*{ARCHIVE}")):
        raise UserError(f"{folder} holds archives: choose another --output, remove them, or add --packed")


def prepare_val(source: Path, labels: list[str], output: Path) -> None:
    """Sort the validation images into output/val/<class>/.

    Args:
        source: Archive or folder of the validation images.
        labels: Classes of validation images 1, 2, ...
        output: Folder of train/ and val/.

    Raises:
        UserError: The labels do not name 50 images of each of 1,000 classes (then nothing is written), or output/val
            in the end does not hold 50 of each, or holds other folders.
    """
    expected = count_labels(labels)
    _refuse_archives(output / "val")
    written = 0
    for name, size, write in validation_images(source):
        if label := class_of(name, labels):
            written += write_if_missing(output / "val" / label / name, size, write)

    # Check the whole folder, and not only what was written now: training would take whatever lies there.
    folder = output / "val"
    counts = {label: len(list((folder / label).glob("*.JPEG"))) for label in expected}
    wrong = {label: count for label, count in counts.items() if count != PER_CLASS}
    unknown = sorted({path.name for path in folder.glob("*") if path.is_dir()} - set(expected))
    if wrong or unknown:
        raise UserError(
            f"{folder} must hold {PER_CLASS} images of each class: {len(wrong)} classes hold other numbers "
            f"{dict(list(wrong.items())[:3])}, folders that are no classes: {unknown[:3]}. Is {source} complete, and "
            "was the folder empty?"
        )
    print(f"{folder}: {PER_CLASS} images of each of {CLASSES} classes, {written} written now")


def class_archives(source: Path, mode: str) -> Iterator[tuple[str, int, tarfile.TarFile]]:
    """Yield (class, where its bytes begin, archive) of each class's archive in the training archive.

    Args:
        source: The training archive.
        mode: That of tarfile.open: "r", or "r:" if nothing may be compressed.

    Raises:
        UserError: The archive holds something else than archives of classes, or, at the end, not 1,000 of them.
        TarError, EOFError: An archive is damaged or cut off.
    """
    classes = 0
    with tarfile.open(source, mode, tarinfo=StrictInfo) as outer:
        for inner in outer:
            label = Path(inner.name).stem
            if not CLASS.fullmatch(label) or not inner.isfile():
                raise UserError(
                    f"{source} holds {inner.name} instead of archives like n01440764.tar: give ILSVRC2012_img_train.tar"
                )
            classes += 1
            with tarfile.open(fileobj=outer.extractfile(inner), mode=mode, tarinfo=StrictInfo) as archive:
                yield label, inner.offset_data, archive
    if classes != CLASSES:
        raise UserError(f"{source} holds {classes} classes instead of {CLASSES}: is it complete?")


def class_images(source: Path, mode: str) -> Iterator[tuple[str, int, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield what `class_archives` yields and an image in that archive, for each image.

    Raises:
        UserError: The archive of a class holds no images; or what `class_archives` raises, which raises TarError and
            EOFError as well.
    """
    for label, start, archive in class_archives(source, mode):
        images = 0
        for member in archive:
            if member.isfile() and is_image(Path(member.name).name):
                images += 1
                yield label, start, archive, member
        if not images:
            raise UserError(f"{source} holds no images of {label}: is it complete?")


def prepare_train(source: Path, output: Path) -> None:
    """Unpack the training archive, which holds an archive per class, into output/train/<class>/.

    The images are not counted.

    Raises:
        UserError: The archive holds something else than archives of classes, or not 1,000 of them, or output/train
            holds archives.
        TarError, EOFError: The archive is damaged or cut off; `main` makes a message of that.
    """
    _refuse_archives(output / "train")
    written = total = 0
    for label, _, archive, member in class_images(source, "r"):
        target = output / "train" / label / Path(member.name).name
        written += write_if_missing(target, member.size, partial(_extract, archive, member))
        total += 1
    print(f"{output / 'train'}: {total} images of {CLASSES} classes, {written} written now")


def _pack(places: dict[str, Place], folder: Path) -> None:
    """Pack images into the shards of a folder.

    Args:
        places: Where each image lies, by <class>/<file>.
        folder: Folder of the shards.

    Raises:
        UserError: What pack_split raises.
    """
    names = sorted(places)

    def read(numbers: list[int]) -> Iterator[bytes]:
        """Yield the contents of the images with these numbers, as PackedImages.read does."""
        for number in numbers:
            path, offset, size = places[names[number]]
            with readable(path):
                data = os.pread(open_archive(str(path)), size, offset)
            yield data

    sizes = [places[name][2] for name in names]
    classes = sorted({name.partition("/")[0] for name in names})
    pack_split(PackedImages(names, sizes, classes, read), folder, SHARD_SIZE)


def pack_val(source: Path, labels: list[str], output: Path) -> None:
    """Pack the validation images into output/val/shard-*.tar, in class folders.

    Args:
        source: Archive or folder of the validation images.
        labels: Classes of validation images 1, 2, ...
        output: Folder of train/ and val/.

    Raises:
        UserError: The labels do not name 50 images of each of 1,000 classes, the source does not hold 50 of each, or
            the shards can't be written. In the first two cases nothing is written.
    """
    expected = count_labels(labels)
    if source.is_dir():
        found = [(path.name, (path, 0, path.stat().st_size)) for path in sorted(source.glob("*.JPEG"))]
    else:
        index = load_index(source)
        members = zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True)
        found = [(Path(name).name, (source, offset, size)) for name, offset, size in members]
    places = {}
    for name, place in found:
        label = class_of(name, labels)
        if label and is_image(name):
            places[f"{label}/{name}"] = place

    counts = Counter(name.partition("/")[0] for name in places)
    wrong = {label: counts[label] for label in expected if counts[label] != PER_CLASS}
    if wrong:
        raise UserError(
            f"{source} must hold {PER_CLASS} images of each class: {len(wrong)} classes have other numbers "
            f"{dict(list(wrong.items())[:3])}. Is it complete?"
        )
    _pack(places, output / "val")


def pack_train(source: Path, output: Path) -> None:
    """Pack the training images into output/train/shard-*.tar, in class folders, without unpacking the archive.

    Raises:
        UserError: The archive holds something else than archives of classes, or not 1,000 of them (then nothing is
            written), or the shards can't be written. The images are not counted.
        TarError, EOFError: The archive is compressed, damaged or cut off; `main` makes a message of that.
    """
    found = tqdm(class_images(source, "r:"), "listing images", leave=False, disable=None)
    places = {
        f"{label}/{Path(member.name).name}": (source, start + member.offset_data, member.size)
        for label, start, _, member in found
    }
    _pack(places, output / "train")


def main(argv: list[str] | None = None) -> None:
    """Prepare one split or both (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write train/ and val/ to")
    parser.add_argument("--train", type=Path, metavar="TAR", help="archive of the training images")
    parser.add_argument("--val", type=Path, metavar="TAR_OR_FOLDER", help="validation images")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="classes of the validation images; needed with --val"
    )
    parser.add_argument("--packed", action="store_true", help="write shards instead of folders of images")
    args = parser.parse_args(argv)
    if not args.train and not args.val:
        raise UserError("there is nothing to prepare: give --train, --val or both")
    if args.val and not args.labels:
        raise UserError("--val needs --labels: the development kit, LOC_val_solution.csv or a list of classes")
    for path in filter(None, (args.train, args.val, args.labels)):
        if not exists(path):
            raise UserError(f"{path}: no such file or folder")
        if path.is_dir() and path != args.val:
            raise UserError(f"{path} is a folder: name a file")

    # The smaller split first: what is wrong with it shows in minutes.
    try:
        if args.val:
            (pack_val if args.packed else prepare_val)(args.val, open_labels(args.labels), args.output)
        if args.train:
            (pack_train if args.packed else prepare_train)(args.train, args.output)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"an archive cannot be read: {type(error).__name__} {error}. Is the file complete?") from error
    except OSError as error:
        full = ": is the disk full?" if error.errno in errors.FULL else ""
        raise UserError(f"{error}{full}") from error


if __name__ == "__main__":
    errors.run(main)

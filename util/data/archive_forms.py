"""List the images of a split that is stored in tar archives, with the class of each.

    data_path/train.tar                 <class>/<images>
    data_path/train/*.tar               archives of one of three forms:
        <class>/<images>                shards, over which the classes may be spread in any way
        <images>                        an archive per class, <class>.tar
        <key>.jpg and <key>.cls         WebDataset: .cls, or .json with "label", holds a class's number or name. The
                                        names of numbers are the lines of classes.txt beside the archives, or in
                                        data_path, else class_<number>

Leading folders that all images share are ignored up to the one named like the split (tar cf train.tar train). For
pre-training, train.tar may also hold images without class folders, and WebDataset shards may lack classes. The result
equals the listing of the same images in class folders: classes, order, names and masks are the same. There is one
difference: classes that are given as numbers keep them, while folders are numbered in the order of their names.
"""

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.data.archive_index import load_index
from util.data.archives import Members, open_archive
from util.data.listing import LeftOut, Listing, join_names
from util.data.tar import BadArchive

LABELS = (".cls", ".json")  # endings of the members that hold a sample's class
CLASS_NAMES = "classes.txt"
MOST_CLASSES = 10**6  # a greater number is no class
NameTest = Callable[[str], bool]  # tells from a file's name whether it is wanted


@dataclass
class Files:
    """Files in archives.

    Attributes:
        archives: Paths of the archives.
        names: Name of each file.
        numbers: Number of its archive [files].
        offsets: Where its bytes begin there [files].
        sizes: Number of its bytes [files].
        unfinished: The archives that have no end mark.
    """

    archives: list[Path]
    names: list[str]
    numbers: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    unfinished: list[Path] = field(default_factory=list)

    def pick(self, chosen: list[int]) -> "Files":
        """Return the files of these indices, in their order."""
        names = [self.names[index] for index in chosen]
        places = self.numbers[chosen], self.offsets[chosen], self.sizes[chosen]
        return Files(self.archives, names, *places, self.unfinished)

    def path(self, index: int) -> str:
        """Return archive/name of a file, for messages."""
        return f"{self.archives[self.numbers[index]]}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Return the bytes of a file."""
        archive = str(self.archives[self.numbers[index]])
        return os.pread(open_archive(archive), int(self.sizes[index]), int(self.offsets[index]))


class Classes(NamedTuple):
    """Which class each of some images has.

    Attributes:
        names: Names of the classes, in the order of their numbers.
        targets: Number of each image's class.
        images: Name of each image in the listing, <class>/<file>.
        adds_class: As in Members.
        are_samples: Whether the files make up samples of WebDataset, whose names are unique within an archive only.
    """

    names: list[str]
    targets: list[int]
    images: list[str]
    adds_class: bool = False
    are_samples: bool = False


def list_members(
    archives: list[Path],
    split: str,
    is_wanted: NameTest,
    *,
    flat: bool = False,
    single: bool = False,
    to_pack: bool = False,
) -> Listing:
    """List the images in a split's archives, in one of the forms above.

    Args:
        archives: The archives.
        split: Name of the split, train or val.
        is_wanted: Whether a name is that of an image.
        flat: Where the images have no classes, take them all as one class.
        single: The archive is the whole split, so that its name is no class.
        to_pack: The images are to be packed, in which no class may get lost, whatever `flat` says.

    Returns:
        The images in order of class, folder and name.

    Raises:
        BadArchive: An archive can't be read or is damaged, or the archives have none of the forms.
    """
    # Read the headers, and sort out images and what may be labels.
    images, others, folders = _read_all(archives, is_wanted)
    labels, _ = _divide(others, lambda name: name.endswith(LABELS))
    left_out = LeftOut(no_end=[str(archive) for archive in images.unfinished])
    left_out.sort_out(others.names, is_wanted)
    if not images.names:
        raise BadArchive(_describe_empty(archives, left_out))

    # Find out which form it is, and with it the classes.
    prefix = common_prefix(images.names, split)
    plain = [name[len(prefix) :] for name in images.names]
    if _are_in_folders(images, plain):
        if not flat or to_pack:
            _refuse_labels(images, [name.partition("/")[0] for name in plain], labels)
        folders += [name.rpartition("/")[0] for name in others.names]
        classes = _by_folder(plain, [name[len(prefix) :] for name in folders if name.startswith(prefix)])
    elif found := _find_labels(images, labels):
        classes = _by_label(images, labels, found, split, flat)
        for ending in LABELS:
            del left_out.endings[ending]
    elif single:
        classes = _as_one_class(archives[0], plain, flat)
    else:
        classes = _by_archive(images, plain)
    return _arrange(images, classes, prefix, left_out)


def _divide(files: Files, belongs: NameTest) -> tuple[Files, Files]:
    """Return the files whose names belong to a kind, and the others."""
    chosen = [belongs(name) for name in files.names]
    return (
        files.pick([number for number, own in enumerate(chosen) if own]),
        files.pick([number for number, own in enumerate(chosen) if not own]),
    )


def _are_in_folders(images: Files, names: list[str]) -> bool:
    """Return whether all images are in folders, going by their names without what these have in common.

    Raises:
        BadArchive: Some are, and some are not.
    """
    in_folders = ["/" in name for name in names]
    if any(in_folders) and not all(in_folders):
        raise BadArchive(
            f"some images are in folders ({images.path(in_folders.index(True))}) and some are not "
            f"({images.path(in_folders.index(False))}): pack them anew, all in class folders"
        )
    return all(in_folders)


def _read_all(archives: list[Path], is_wanted: NameTest) -> tuple[Files, Files, list[str]]:
    """Return the images in all archives, the other files, and the names of the folders.

    Raises:
        BadArchive: An archive can't be read or is damaged, or an image is a link or another special file.
    """
    indexes = [load_index(archive) for archive in archives]
    for archive, index in zip(archives, indexes, strict=True):
        for name, kind in index.others.items():
            if kind == "link" or is_wanted(name):
                raise BadArchive(
                    f"{archive}/{name} is a {kind}, which can't be read in place: pack the images anew as plain files "
                    "(tar --dereference --hard-dereference)"
                )
    files = Files(
        archives,
        [name for index in indexes for name in index.names],
        np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.names) for index in indexes]),
        np.concatenate([index.offsets for index in indexes]),
        np.concatenate([index.sizes for index in indexes]),
        [archive for archive, index in zip(archives, indexes, strict=True) if not index.has_end],
    )
    return *_divide(files, is_wanted), [folder for index in indexes for folder in index.folders]


def _describe_empty(archives: list[Path], left_out: LeftOut) -> str:
    there = f" The files there: {left_out}." if str(left_out) else ""
    hint = ""
    if left_out.endings[".tar"]:
        hint = " Archives in archives are not opened: for ImageNet's, python scripts/prepare_imagenet.py --packed"
    return f"no images in {join_names(map(str, archives), 3)}: are they complete?{there}{hint}"


def common_prefix(names: list[str], split: str) -> str:
    """Return the folders up to one named like the split, with a slash at the end, if all names begin so; else ""."""
    folders = names[0].split("/")[:-1]
    if split not in folders:
        return ""
    prefix = "/".join(folders[: folders.index(split) + 1]) + "/"
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _by_folder(names: list[str], folders: list[str]) -> Classes:
    """Take the folder of each image as its class.

    Args:
        names: Names of the images.
        folders: Names of all folders, since one without images is a class, too.
    """
    owners = [name.partition("/")[0] for name in names]
    classes = sorted({folder.partition("/")[0] for folder in folders if folder}.union(owners))
    numbers = {name: number for number, name in enumerate(classes)}
    return Classes(classes, [numbers[owner] for owner in owners], names)


def _as_one_class(archive: Path, names: list[str], flat: bool) -> Classes:
    """Take the images of an archive, which has no folders, as one class; raises a BadArchive unless that is wanted."""
    if not flat:
        raise BadArchive(f"{archive} has no class folders: it must hold <class>/<images>")
    return Classes([""], [0] * len(names), names)


def _by_archive(images: Files, names: list[str]) -> Classes:
    """Take the archive of each image as its class, without the ending .tar; archives without images count, too.

    Args:
        images: The images.
        names: Their names, without what all have in front.
    """
    stems = [archive.stem for archive in images.archives]
    classes = sorted(set(stems))
    numbers = [classes.index(stem) for stem in stems]
    owners = images.numbers.tolist()
    names = [f"{stems[owner]}/{name}" for owner, name in zip(owners, names, strict=True)]
    return Classes(classes, [numbers[owner] for owner in owners], names, adds_class=True)


def _keys(files: Files) -> list[tuple[int, str]]:
    """Return the sample that each file belongs to, as WebDataset tells: archive, and name up to the first dot."""
    keys = []
    for number, name in zip(files.numbers.tolist(), files.names, strict=True):
        folder, _, file = name.rpartition("/")
        keys.append((number, f"{folder}/{file.partition('.')[0]}"))
    return keys


def _find_labels(images: Files, labels: Files) -> list[int | None]:
    """Return for each image the index of its label among the labels, None for one without; [] if none has any."""
    # Of a sample with both, .cls is taken.
    order = sorted(range(len(labels.names)), key=lambda number: labels.names[number].endswith(LABELS[0]))
    keys = _keys(labels)
    by_key = {keys[number]: number for number in order}
    found = [by_key.get(key) for key in _keys(images)] if by_key else []
    return found if any(number is not None for number in found) else []


def _check_samples(images: Files, labels: Files) -> None:
    """Raise a BadArchive if two images, or two labels of one kind, belong to one sample."""
    kinds = [[number for number, name in enumerate(labels.names) if name.endswith(ending)] for ending in LABELS]
    for files in (images, *map(labels.pick, kinds)):
        first: dict[tuple[int, str], int] = {}
        for number, key in enumerate(_keys(files)):
            if first.setdefault(key, number) != number:
                raise BadArchive(
                    f"{files.path(first[key])} and {files.path(number)} belong to one sample, since their names up to "
                    "the first dot are one: pack them anew, with one image and one label per sample"
                )


def _refuse_labels(images: Files, folders: list[str], labels: Files) -> None:
    """Raise a BadArchive for a label beside an image in a folder: which of both is its class is not clear.

    A .json may also hold other things, or repeat the folder's name. Of each folder the first one is read.

    Args:
        images: The images.
        folders: Folder of each.
        labels: Members that may hold labels.
    """
    read = set()
    for folder, number in zip(folders, _find_labels(images, labels), strict=False):
        if number is None:
            continue
        unclear = labels.names[number].endswith(LABELS[0])
        if not unclear and folder not in read:
            read.add(folder)
            with suppress(BadArchive):  # it holds no class
                unclear = _read_label(labels, number) not in (None, folder)
        if unclear:
            raise BadArchive(
                f"{labels.path(number)} is the label of an image in a folder, which stands for a class by itself: pack "
                "the samples anew without folders"
            )


def _by_label(images: Files, labels: Files, found: list[int | None], split: str, flat: bool) -> Classes:
    """Take what the labels say as the images' classes.

    Args:
        images: The images.
        labels: Members that may hold labels.
        found: Index among the labels of each image's label, None for one without.
        split: Name of the split.
        flat: Take all images as one class where not every one has a label that is a class.

    Raises:
        BadArchive: Labels can't be read, are missing, or are no classes.
    """
    # Pre-training needs no classes: labels that are none, such as lists of several, do not matter there.
    names = [posixpath.basename(name) for name in images.names]
    try:
        if not flat:
            _check_samples(images, labels)
        values = [None if number is None else _read_label(labels, number) for number in found]
    except BadArchive:
        if not flat:
            raise
        values = [None] * len(found)
    if flat and None in values:
        return Classes([""], [0] * len(names), names, are_samples=True)
    if None in values:
        raise BadArchive(
            f'{images.path(values.index(None))} has no label: each image needs a .cls, or a .json with "label", of the '
            "same name"
        )

    # Numbers are the classes' own, names are numbered in sorted order.
    kinds = {type(value) for value in values}
    if kinds == {int}:
        classes, targets = _class_names(images, max(values) + 1, split), values
    elif kinds == {str}:
        classes = sorted(set(values))
        numbers = {name: number for number, name in enumerate(classes)}
        targets = [numbers[value] for value in values]
    else:
        raise BadArchive(
            f"some labels are numbers and some are names in {join_names(map(str, images.archives), 3)}, such as "
            f"{next(value for value in values if isinstance(value, str))!r}: pack them anew with labels of one kind"
        )
    listed = [f"{classes[target]}/{name}" for target, name in zip(targets, names, strict=True)]
    return Classes(classes, targets, listed, adds_class=True, are_samples=True)


def _read_label(labels: Files, number: int) -> int | str | None:
    """Return the class that a member states, by its number or name; None if a .json states none.

    Raises:
        BadArchive: It can't be read, or is no class.
    """
    path = labels.path(number)
    try:
        data = labels.read(number)
        if len(data) < labels.sizes[number]:
            raise ValueError("it is cut off")
        text = data.decode()
        if path.endswith(".json"):
            entries = json.loads(text)
            label = entries.get("label", entries.get("cls")) if isinstance(entries, dict) else None
        else:
            label = text.strip()
    except (OSError, ValueError, RecursionError) as error:
        raise BadArchive(f"{path} can't be read as a label: {error}") from error
    if label is None:
        return None

    # A number may be written as text, or with a point.
    if isinstance(label, str) and re.fullmatch(r"-?\d{1,18}", label) or isinstance(label, float) and label.is_integer():
        label = int(label)
    if type(label) is int and 0 <= label < MOST_CLASSES:
        return label
    if isinstance(label, str) and label not in ("", ".", "..") and not re.search("[/\0\ud800-\udfff]", label):
        return label
    raise BadArchive(
        f"{path} has the label {label!r:.40}, which is no class: give a number from 0 up, or a name without /"
    )


def _class_names(images: Files, count: int, split: str) -> list[str]:
    """Return the names of numbered classes: the lines of classes.txt, or class_0, class_1, ...

    Args:
        images: The images; classes.txt lies beside their archives or, where these are in a folder of the split's name,
            beside that.
        count: Smallest number of classes.
        split: Name of the split.

    Raises:
        BadArchive: classes.txt has too few lines, or lines that are no names.
    """
    folder = images.archives[0].absolute().parent
    candidates = [folder, folder.parent] if folder.name == split else [folder]
    file = next((place / CLASS_NAMES for place in candidates if (place / CLASS_NAMES).is_file()), None)
    if file is None:
        return [f"class_{number}" for number in range(count)]
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise BadArchive(f"cannot read {file}: {error}") from error
    names = [name.strip() for name in names]
    if len(names) < count:
        raise BadArchive(
            f"{file} names {len(names)} classes, and there is a label {count - 1}: a line per class is needed"
        )
    twice = [name for name, times in Counter(names).items() if times > 1 or not name or "/" in name]
    if twice:
        raise BadArchive(
            f"{file} needs a name without / per line, each once: {join_names(map(repr, twice), 3)} is wrong"
        )
    return names


def folder_and_file(name: str) -> tuple[str, str]:
    """Return the folder and the file of a name, by which the images of a class are ordered, as in folders."""
    return name.rpartition("/")[::2]


def _arrange(images: Files, classes: Classes, prefix: str, left_out: LeftOut) -> Listing:
    """Return the listing of images, ordered as those of class folders are.

    Args:
        images: The images.
        classes: Their classes.
        prefix: As in Members.
        left_out: What is not listed.

    Raises:
        BadArchive: Two images have one name.
    """
    # Order by class number, folder and file, as folders are listed: there "a/1.png" comes before "a b/1.png", which as
    # plain text is the smaller one.
    keys = ["\0".join(folder_and_file(name)) for name in classes.images]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    targets = np.array(classes.targets, np.int32)
    order = order[np.argsort(targets[order], kind="stable")].tolist()

    # Two images of the same name could not lie in one folder, and it is unknown which of them is meant: refuse both.
    for first, second in pairwise(order):
        if keys[first] == keys[second] and not (
            classes.are_samples and images.numbers[first] != images.numbers[second]
        ):
            raise BadArchive(
                f"{images.path(first)} and {images.path(second)} have one name, {classes.images[first]}: pack the "
                "images anew, each under a name of its own"
            )

    # Every name is encoded with a zero byte after it; taking these out leaves the ends of the names.
    images = images.pick(order)
    names = np.frombuffer(os.fsencode("".join(f"{classes.images[number]}\0" for number in order)), np.uint8)
    ends = np.flatnonzero(names == 0) - np.arange(len(order))
    archives = [str(path) for path in images.archives]
    return Listing(
        str(images.archives[0].parent),
        names[names != 0],
        ends,
        targets[order],
        left_out,
        classes.names,
        Members(archives, images.numbers, images.offsets, images.sizes, prefix, classes.adds_class),
    )

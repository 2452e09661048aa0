"""List the images of a split that is stored in tar archives, with the class of each.

    data_path/train.tar                 <class>/<images>
    data_path/train/*.tar               archives of one of three forms:
        <class>/<images>                shards, over which the classes may be spread in any way
        <images>                        an archive per class, <class>.tar
        <key>.jpg and <key>.cls         WebDataset, whose labels util/data/webdataset.py reads

Leading folders that all images share are ignored up to the one named like the split (tar cf train.tar train). For
pre-training, train.tar may also hold images without class folders, and WebDataset shards may lack classes. The result
equals the listing of the same images in class folders: classes, order, names and masks are the same. There is one
difference: classes that are given as numbers keep them, while folders are numbered in the order of their names.
"""

import os
import posixpath
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.data.archive_index import load_index
from util.data.archives import Files, Members
from util.data.listing import LeftOut, Listing
from util.data.tar import BadArchive
from util.data.webdataset import LABELS, find_labels, read_classes, refuse_labels
from util.words import join_names

NameTest = Callable[[str], bool]  # tells from a file's name whether it is wanted


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
    classes_optional: bool = False,
    single: bool = False,
    to_pack: bool = False,
) -> Listing:
    """List the images in a split's archives, in one of the forms above.

    Args:
        archives: The archives.
        split: Name of the split, train or val.
        is_wanted: Whether a name is that of an image.
        classes_optional: Also accept images without classes; all then count as one class.
        single: The archive is the whole split, so that its name is no class.
        to_pack: The images are to be packed: labels beside images in folders are refused with `classes_optional`, too.

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
    if are_in_folders(plain, images.path, "pack them anew, all in class folders"):
        if not classes_optional or to_pack:
            refuse_labels(images, [name.partition("/")[0] for name in plain], labels)
        folders += [name.rpartition("/")[0] for name in others.names]
        classes = _by_folder(plain, [name[len(prefix) :] for name in folders if name.startswith(prefix)])
    elif found := find_labels(images, labels):
        classes = _by_label(images, labels, found, split, classes_optional)
        for ending in LABELS:
            del left_out.endings[ending]
    elif single:
        classes = _as_one_class(archives[0], plain, classes_optional)
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


def are_in_folders(names: list[str], shown: Callable[[int], str], remedy: str) -> bool:
    """Return whether images are in folders, all of them or none.

    Args:
        names: Their names, without what all have in front.
        shown: Returns what a message calls the image of an index.
        remedy: What to do if some are and some are not, for the message.

    Raises:
        BadArchive: Some are, and some are not.
    """
    in_folders = ["/" in name for name in names]
    if any(in_folders) and not all(in_folders):
        inside, outside = shown(in_folders.index(True)), shown(in_folders.index(False))
        raise BadArchive(f"some images are in folders ({inside}) and some are not ({outside}): {remedy}")
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
    there = left_out.sentence()
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
    of_images = [name.partition("/")[0] for name in names]
    classes = sorted({folder.partition("/")[0] for folder in folders if folder}.union(of_images))
    numbers = {name: number for number, name in enumerate(classes)}
    return Classes(classes, [numbers[name] for name in of_images], names)


def _as_one_class(archive: Path, names: list[str], classes_optional: bool) -> Classes:
    """Take the images of an archive, which has no folders, as one class; raises a BadArchive unless that is wanted."""
    if not classes_optional:
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
    archive_ids = images.archive_ids.tolist()
    names = [f"{stems[archive_id]}/{name}" for archive_id, name in zip(archive_ids, names, strict=True)]
    return Classes(classes, [numbers[archive_id] for archive_id in archive_ids], names, adds_class=True)


def _by_label(images: Files, labels: Files, found: list[int | None], split: str, classes_optional: bool) -> Classes:
    """Take what the labels say as the images' classes, or all images as one class if `read_classes` says so."""
    names = [posixpath.basename(name) for name in images.names]
    read = read_classes(images, labels, found, split, classes_optional)
    if read is None:
        return Classes([""], [0] * len(names), names, are_samples=True)
    classes, targets = read
    listed = [f"{classes[target]}/{name}" for target, name in zip(targets, names, strict=True)]
    return Classes(classes, targets, listed, adds_class=True, are_samples=True)


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
            classes.are_samples and images.archive_ids[first] != images.archive_ids[second]
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
        Members(archives, images.archive_ids, images.offsets, images.sizes, prefix, classes.adds_class),
    )

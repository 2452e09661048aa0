"""Datasets over folders of images.

    data_path/train/<class>/*.jpg
    data_path/val/<class>/*.jpg

Pre-training also takes images without class folders, in data_path/train, or in data_path where there is no such folder.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from util.data import listing
from util.data.images import EXTENSIONS, BadImage, Pixels, WrongChannels, load_array
from util.data.listing import join_names
from util.distributed import dist
from util.errors import LocalError, UserError
from util.rng import seed_all

# Names that folders beside a missing one often have instead.
OTHER_NAMES = {"train": ("training", "train2017"), "val": ("valid", "validation", "test", "testing", "eval", "dev")}
ENDINGS = (
    f"Image files end in .jpg, .png, .tif, .webp, .npy or one of {len(EXTENSIONS) - 5} other endings"  # for messages
)
TRIES = 100  # unreadable images in a row before the disk is suspected
Sample = tuple[Tensor, int]  # an image and the number of its class


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files (.DS_Store, ._a.jpg) are not."""
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


class Images(ImageFolder):
    """Images of one split: (image, class number) by index, without hidden files and folders.

    `mixed` tells whether images lie both in the split's folder itself and in folders there, and all count as one class.
    """

    needs_every_class = True  # a class without images is an error
    announce = True  # what is unusable is named; not where other images of the same files do so already

    def __init__(self, root: Path, transform: Callable | None, pixels: Pixels, flat: bool = False) -> None:
        """List the images of a folder.

        Args:
            root: Folder that holds the class folders.
            transform: From an array [H, W, C] to a tensor [C, H, W]; None: the arrays are returned as they are.
            pixels: How files become the model's input.
            flat: Where images lie in root itself, take all images, those in folders too, as one class.

        Raises:
            UserError: There are no class folders.
        """
        self.pixels, self.flat = pixels, flat
        super().__init__(root, transform, loader=partial(load_array, pixels=pixels))
        self.targets = self.samples.targets

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_, **__) -> listing.Listing:
        """List (path, class number) of every image; rank 0 reads the folders and broadcasts the list."""
        return dist.run_on_rank0(lambda: listing.list_files(directory, class_to_idx, is_image))

    def name(self, index: int) -> str:
        """Return the path of an image, relative to the split's folder."""
        return os.path.relpath(self.samples[index][0], self.root)

    def counts(self) -> np.ndarray:
        """Return the number of images of every class."""
        return np.bincount(self.targets, minlength=len(self.classes))

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the class folders in sorted order, and a dict from name to class number.

        If flat is set and images lie in the directory itself, the only class is "", which stands for the directory.

        Raises:
            UserError: There are no class folders.
        """
        names = sorted(name for name, _ in listing.read_folder(str(directory))[0])
        self.mixed = bool(names) and self.flat and _has_images(directory)
        if self.flat and _has_images(directory):
            names = [""]  # one class, which is the directory itself
        if not names:
            raise UserError(f"{directory} has no class folders: it must hold <class>/<images>")
        return names, {name: number for number, name in enumerate(names)}


def _has_images(folder: str | Path) -> bool:
    """Return whether the folder itself holds an image; its subfolders are not searched."""
    return any(map(is_image, listing.read_folder(str(folder))[1]))


class EvalImages(Images):
    """Split for evaluation, which counts every image: an unreadable image is an error, a class may have none."""

    needs_every_class = False

    def __getitem__(self, index: int) -> Sample:
        try:
            return super().__getitem__(index)
        except BadImage as error:
            raise LocalError(f"{error}; evaluation counts every image: fix or remove the file") from error


class MonitorImages(Images):
    """Images of one split, for monitoring pre-training; an unreadable image is replaced by the next readable one.

    stderr names the unreadable one. After TRIES in a row, indexing raises a LocalError. A class may have no images.
    """

    needs_every_class = False

    def __init__(self, root: Path, transform: Callable, pixels: Pixels, flat: bool = False) -> None:
        """List the images of a folder, as Images does."""
        super().__init__(root, transform, pixels, flat)
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> Sample:
        candidates = (number % len(self) for number in range(index, index + TRIES))
        try:
            return _first_readable(super().__getitem__, candidates, self._report if self.announce else None)
        except LocalError as error:
            raise LocalError(f"{error}. Fix the images, or turn monitoring off with --monitor_freq 0") from error

    def _report(self, index: int, error: BadImage) -> None:
        _report_bad(self.bad, index, error)


def _first_readable(
    load: Callable[[int], Sample], candidates: Iterable[int], on_bad: Callable[[int, BadImage], None] | None = None
) -> Sample:
    """Load the first readable image among the first TRIES candidates.

    Args:
        load: Loads the image of an index.
        candidates: Indices, drawn one at a time.
        on_bad: Called with the index of each unreadable image and its error.

    Returns:
        The image and the number of its class.

    Raises:
        LocalError: None of them is readable.
    """
    last_error = None
    for index in islice(candidates, TRIES):
        try:
            return load(index)
        except BadImage as error:
            last_error = error
            if on_bad:
                on_bad(index, error)
    raise LocalError(f"{TRIES} images in a row cannot be read, the last one being {last_error}. Check the disk")


def _report_bad(bad: Tensor, index: int, error: BadImage) -> None:
    """Name an unreadable image on stderr, once.

    Args:
        bad: Marks of the images that were named [images], which the loader's processes share.
        index: Number of the image.
        error: Names it, and the reason.
    """
    if not bad[index]:
        bad[index] = 1
        print(f"unreadable image, replaced by another one: {error}", file=sys.stderr, flush=True)


class TrainImages(Dataset):
    """Split for training: (image, class number) by (epoch, index).

    Indexing seeds the process's random streams from (seed, epoch, index), so that a sample is the same in any process,
    at any time. An unreadable image is replaced by a random other one; stderr names the unreadable one, and `bad`
    [images], which the loader's processes share, marks it. After TRIES in a row, indexing raises a LocalError.
    """

    def __init__(self, images: Images, seed: int, fraction: float = 1.0) -> None:
        """Wrap the images of a split.

        Args:
            images: All images of the split.
            seed: Of the augmentations, and of the choice of images where fraction is less than 1.
            fraction: Share of every class's images to train on, at least one image each.
        """
        self.images, self.seed = images, seed
        self.chosen = _choose_per_class(images, seed, fraction) if fraction < 1 else None
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.images if self.chosen is None else self.chosen)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        seed_all(self.seed, epoch, index)
        return _first_readable(self._load, self._candidates(index), partial(_report_bad, self.bad))

    def _load(self, index: int) -> Sample:
        return self.images[index if self.chosen is None else int(self.chosen[index])]

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the index itself, then random ones to replace it."""
        while True:
            yield index
            index = int(torch.randint(len(self), ()))


def _choose_per_class(images: Images, seed: int, fraction: float) -> np.ndarray:
    """Choose a random share of each class's images, at least one of each; return their sorted indices."""
    # A stable sort of the shuffled images by class leaves every class's images together, in random order.
    shuffled = np.random.default_rng(seed).permutation(len(images))
    by_class = shuffled[np.argsort(images.targets[shuffled], kind="stable")]

    # Of each class, take the first images of that random order.
    starts = np.cumsum([0, *images.counts()])
    chosen = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        count = max(1, round(fraction * (end - start)))
        chosen.append(by_class[start : start + count])
    return np.sort(np.concatenate(chosen))


def open_split(
    kind: type[Images],
    data_path: str,
    split: str,
    transform: Callable,
    pixels: Pixels,
    *,
    flat: bool = False,
    announce: bool = True,
) -> Images:
    """Open data_path/split and check that there are images, and that the first, if readable, fits the model.

    Args:
        kind: Class of the dataset; it tells whether a class may have no images.
        data_path: Folder that holds the splits.
        split: Name of the split's folder, train or val.
        transform: From an array [H, W, C] to a tensor [C, H, W].
        pixels: How files become the model's input.
        flat: Also take images without class folders, and data_path itself if it holds images and has no such split.
        announce: Name what is unusable: what is in the folders and not in the list, unreadable images of a monitor.

    Returns:
        The dataset.

    Raises:
        UserError: The split's folder is missing or has no class folders, a class has no images though it needs some, or
            the first image can't be converted to the model's channels.
    """
    # Find the folder.
    folder = Path(data_path) / split
    if not folder.is_dir():
        if not (flat and _has_images(data_path)):
            raise UserError(
                f"no folder {folder}: --data_path must hold {split}/<class>/<images>{similar(data_path, split)}"
            )
        folder = Path(data_path)

    # List the images.
    dataset = kind(folder, transform, pixels, flat)
    dataset.announce = announce
    left_out = dataset.samples.left_out
    _check_not_empty(dataset, left_out)
    if announce and str(left_out):
        dist.print_rank0(f"notice: left out in {folder}: {left_out}")
    if announce and dataset.mixed:
        dist.print_rank0(
            f"notice: {folder} holds images beside its folders: the images in the folders are used as well, and all of "
            "them without classes"
        )

    # Decode one image: if its channels do not fit, neither will those of the others.
    try:
        load_array(dataset.samples[0][0], pixels)
    except WrongChannels as error:
        raise UserError(str(error)) from error
    except BadImage:
        pass  # one unreadable image is dealt with when it is drawn, as the kind of dataset demands
    return dataset


def _check_not_empty(dataset: Images, left_out: listing.LeftOut) -> None:
    """Raise a UserError where a class has no images and needs some, or no class has any; else print a notice."""
    empty = [name for name, count in zip(dataset.classes, dataset.counts(), strict=True) if not count]
    if not empty:
        return
    folders = join_names(str(Path(dataset.root) / name) for name in empty)
    if len(dataset) and not dataset.needs_every_class:
        dist.print_rank0(f"notice: {len(empty)} of {len(dataset.classes)} classes have no images: {folders}")
        return

    # A training class without any is more likely an unfinished copy than intended.
    there = f" The files there: {left_out}." if str(left_out) else ""
    raise UserError(f"no images in {folders}: add some, or remove the folder from every split.{there} {ENDINGS}")


def similar(data_path: str, split: str) -> str:
    """Return a phrase on the folders that may be meant where a split's folder is missing; "" if there are none."""
    names = [name for name, _ in listing.read_folder(data_path)[0] if name.lower() in (split, *OTHER_NAMES[split])]
    return f" (there is {join_names(sorted(names))}: rename it, or link {split} to it)" if names else ""


def class_differences(first: list[str], second: list[str], first_name: str, second_name: str) -> str:
    """Describe in words which classes only one of two lists has.

    Args:
        first: Names of classes.
        second: Names of classes to compare them with.
        first_name: Name of the first list in the description.
        second_name: Name of the second list.

    Returns:
        The description; empty if both lists have the same classes, in whatever order.
    """
    parts = [
        f"only in {name}: {join_names(sorted(set(classes) - set(others)))}"
        for name, classes, others in ((first_name, first, second), (second_name, second, first))
        if set(classes) - set(others)
    ]
    return "; ".join(parts)


def check_classes(train: Images, val: Images, nb_classes: int) -> None:
    """Check that both splits have the same classes, as many as the head.

    Args:
        train: Training split.
        val: Validation split.
        nb_classes: Number of outputs of the head.

    Raises:
        UserError: The classes differ, or their number does.
    """
    if train.classes != val.classes:
        differing = class_differences(train.classes, val.classes, str(train.root), str(val.root))
        raise UserError(
            f"the classes of train and val differ. {differing}. Both must hold the same class folders; in val those of "
            "classes without validation images may be empty"
        )
    if len(val.classes) != nb_classes:
        raise UserError(
            f"{val.root} has {len(val.classes)} classes and --nb_classes is {nb_classes}: "
            f"pass --nb_classes {len(val.classes)}"
        )

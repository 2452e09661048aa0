"""Datasets over the images of a split, which lie in folders or archives (util/data/splits.py)."""

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from util.data import splits
from util.data.images import BadImage, PixelSpec, WrongChannels, load_array
from util.data.listing import Listing
from util.data.splits import DataSpec
from util.distributed import dist
from util.errors import LocalError, UserError
from util.rng import seed_all
from util.words import join_names

TRIES = 100  # unreadable images in a row before the disk is suspected
Sample = tuple[Tensor, int]  # an image and the number of its class


class Images(ImageFolder):
    """Images of one split: (image, class number) by index, without hidden files and folders."""

    needs_every_class = True  # a class without images is an error
    announce = True  # name unreadable images on stderr; False if another dataset of the same files names them

    def __init__(self, root: Path, listing: Listing, transform: Callable | None, pixels: PixelSpec) -> None:
        """Set up the dataset.

        Args:
            root: Folder or archive of the split, for messages.
            listing: The images in it, and their classes.
            transform: From an array [H, W, C] to a tensor [C, H, W]; None: the arrays are returned as they are.
            pixels: How files become the model's input.
        """
        self.pixels, self.listing = pixels, listing
        super().__init__(root, transform, loader=partial(load_array, pixels=pixels))
        self.targets = listing.targets

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and a dict from name to class number."""
        classes = self.listing.classes
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, *_, **__) -> Listing:
        """Return the list of (path, class number) of every image."""
        return self.listing

    def name(self, index: int) -> str:
        """Return the path of an image, relative to the split's folder."""
        return self.listing.name(index)

    def counts(self) -> np.ndarray:
        """Return the number of images of every class."""
        return np.bincount(self.targets, minlength=len(self.classes))


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

    def __init__(self, root: Path, listing: Listing, transform: Callable, pixels: PixelSpec) -> None:
        """Set up the dataset, as Images does."""
        super().__init__(root, listing, transform, pixels)
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
            seed: Seed of the augmentations, and of the choice of images where fraction is less than 1.
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

    def counts(self) -> np.ndarray:
        """Return the number of images of every class that are trained on."""
        targets = self.images.targets if self.chosen is None else self.images.targets[self.chosen]
        return np.bincount(targets, minlength=len(self.images.classes))

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
    data: DataSpec,
    split: str,
    transform: Callable | None,
    pixels: PixelSpec,
    *,
    classes_optional: bool = False,
) -> Images:
    """Open a split and check that there are images, and that the first, if readable, fits the model.

    Args:
        kind: Class of the dataset; it tells whether a class may have no images.
        data: The run's images.
        split: Name of the split, train or val.
        transform: From an array [H, W, C] to a tensor [C, H, W]; None: the arrays are returned as they are.
        pixels: How files become the model's input.
        classes_optional: As in splits.list_part.

    Returns:
        The dataset.

    Raises:
        UserError: The split is missing, has no classes or can't be read, a class has no images though it needs some, or
            the first image can't be converted to the model's channels.
    """
    # Rank 0 reads folders and headers, and broadcasts the list.
    source, found = dist.run_on_rank0(lambda: splits.list_part(data, split, classes_optional))
    dataset = kind(source.root, found, transform, pixels)
    _check_not_empty(dataset, named=bool(data.class_names))
    for notice in _notices(data, split, dataset):
        dist.print_rank0(f"notice: {notice}")

    # Decode one image: if its channels do not fit, neither will those of the others.
    try:
        load_array(dataset.samples[0][0], pixels)
    except WrongChannels as error:
        raise UserError(str(error)) from error
    except (BadImage, LocalError):
        pass  # what can't be read is dealt with when it is drawn: one rank alone may be in trouble
    return dataset


def _notices(data: DataSpec, split: str, dataset: Images) -> list[str]:
    """Return what the user should know about a split that was listed."""
    root, found = Path(dataset.root), dataset.listing
    if data.val_fraction and split == "val":
        # Notices about the folder itself are printed when the training split is opened.
        counts = dataset.counts()
        of_each = f": {counts.min():,} to {counts.max():,} of each class" if len(counts) > 1 else ""
        total = len(found) + found.held_out
        notices = [f"{len(found):,} of the {total:,} images in {root} are held out as val{of_each}"]
        unread = [place for name in ("val", f"val{splits.ARCHIVE}") if (place := Path(data.path) / name).exists()]
        return notices + [f"{place} is not read, since --val_fraction is given" for place in unread]

    notices = []
    if str(found.left_out):
        notices.append(f"left out of {split}, in {root}: {found.left_out}")
    if found.mixed:
        notices.append(
            f"{root} holds images beside its folders: the images in the folders are used as well, and all of them "
            "without classes"
        )
    archive = Path(data.path) / f"{split}{splits.ARCHIVE}"
    if root == Path(data.path) / split and root.is_dir() and archive.is_file():
        notices.append(f"{archive} is not read, since there is {root}")
    return notices


def _check_not_empty(dataset: Images, named: bool) -> None:
    """Raise a UserError where a class has no images and needs some, or no class has any; else print a notice.

    Args:
        dataset: The images of a split.
        named: --class_names names the classes, of which some then need not have a folder.
    """
    empty = [name for name, count in zip(dataset.classes, dataset.counts(), strict=True) if not count]
    if not empty:
        return
    folders = join_names(str(Path(dataset.root) / name) for name in empty)
    if len(dataset) and not dataset.needs_every_class:
        dist.print_rank0(f"notice: {len(empty)} of {len(dataset.classes)} classes have no images: {folders}")
        return

    if not len(dataset) and dataset.listing.held_out:
        raise UserError(
            f"no image of {dataset.root} can be held out for validation: none of its classes has two or more"
        )

    # A training class without any is more likely an unfinished copy than intended.
    left_out = dataset.listing.left_out
    there = left_out.sentence()
    instead = "take the class out of --class_names and" if named else "remove the folder from"
    raise UserError(f"no images in {folders}: add some, or {instead} every split.{there} {splits.ENDINGS}")


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
    composed = [{unicodedata.normalize("NFC", name) for name in classes} for classes in (first, second)]
    if parts and composed[0] == composed[1]:
        parts.append("they look alike, but their accents are encoded differently (Unicode's NFC and NFD): rename them")
    return "; ".join(parts)


def refuse_class_mismatch(train: Images, val: Images, nb_classes: int) -> None:
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
        if any(images.listing.members and images.classes[0] == "class_0" for images in (train, val)):
            differing += "; a classes.txt in --data_path names the numbered classes of both"
        raise UserError(
            f"the classes of train and val differ. {differing}. Both must hold the same class folders; in val those of "
            "classes without validation images may be empty"
        )
    if len(val.classes) != nb_classes:
        raise UserError(
            f"{val.root} has {len(val.classes)} classes and --nb_classes is {nb_classes}: "
            f"pass --nb_classes {len(val.classes)}"
        )

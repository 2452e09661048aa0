"""Folders of images.

    data_path/train/<class>/*.jpg
    data_path/val/<class>/*.jpg

Pre-training also takes images without class folders, in data_path/train, or in data_path where there is no such folder.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import listing
from util.data.images import BadImage, Pixels, WrongChannels, load_array
from util.distributed import dist
from util.errors import LocalError, UserError
from util.rng import seed_all

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
TRIES = 100  # unreadable images in a row before the disk is suspected
Sample = tuple[Tensor, int]


def is_image(name: str) -> bool:
    """Whether a file's name is an image's; hidden ones (.DS_Store, ._a.jpg) are not."""
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


class Images(ImageFolder):
    """One split: (picture, class) by index. Hidden files and folders are left out."""

    def __init__(self, root: Path, transform: Callable, pixels: Pixels, flat: bool = False) -> None:
        """transform: from an array [H, W, C] to a tensor; flat: images in root itself are a class, all there is."""
        self.pixels, self.flat = pixels, flat
        super().__init__(root, transform, loader=partial(load_array, exif=pixels.exif, channels=pixels.channels))
        self.targets = self.samples.targets

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_, **__) -> listing.Listing:
        """All (path, class); rank 0 looks them up for all."""
        return dist.run_on_rank0(lambda: listing.list_files(directory, class_to_idx, is_image))

    def name(self, index: int) -> str:
        """The path within the split."""
        return os.path.relpath(self.samples[index][0], self.root)

    def counts(self) -> np.ndarray:
        """Images per class."""
        return np.bincount(self.targets, minlength=len(self.classes))

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """The names of the class folders in order, and each one's number."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if self.flat and _has_images(directory):
            if names:
                dist.print_rank0(
                    f"notice: images lie beside the folders in {directory}: all are taken, without classes"
                )
            names = [""]
        if not names:
            raise UserError(f"{directory} has no class folders: it must hold <class>/<images>")
        return names, {name: number for number, name in enumerate(names)}


def _has_images(folder: str | Path) -> bool:
    """Whether some lie in the folder itself."""
    return any(is_image(entry.name) and entry.is_file() for entry in os.scandir(folder))


class EvalImages(Images):
    """A split where every image counts: a bad file is an error."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(index)
        except BadImage as error:
            raise LocalError(f"{error}; evaluation counts every image: fix or remove the file") from error


class MonitorImages(Images):
    """Split for monitoring; an unreadable image is replaced by the next one."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        candidates = (number % len(self) for number in range(index, index + TRIES))
        try:
            return _first_readable(super().__getitem__, candidates)
        except LocalError as error:
            raise LocalError(f"{error}. Fix them, or monitor nothing (--monitor_freq 0)") from error


def _first_readable(
    load: Callable[[int], Sample], candidates: Iterable[int], on_bad: Callable[[int, BadImage], None] | None = None
) -> Sample:
    """Load the first of the candidates that is a readable image, of at most TRIES.

    Args:
        load: Loads the image of an index.
        candidates: Indices, drawn one at a time.
        on_bad: Called with the index of an unreadable image and what is wrong with it.

    Raises:
        LocalError: None of them is readable.
    """
    problem = None
    for _, index in zip(range(TRIES), candidates, strict=False):
        try:
            return load(index)
        except BadImage as error:
            problem = error
            if on_bad:
                on_bad(index, error)
    raise LocalError(f"{TRIES} images in a row cannot be read, is the disk all right? The last one: {problem}")


class TrainImages(Dataset):
    """A split to train on: (epoch, index) -> (picture, class).

    What is random about a sample follows from (seed, epoch, index) alone, so that it is the same in any process, at
    any time. A bad file is replaced by another image of the split, named on stderr, and marked in `bad` [images],
    which the loader's processes share.
    """

    def __init__(self, images: Images, seed: int, fraction: float = 1.0) -> None:
        """fraction: of every class, at least one image each, chosen by the seed."""
        self.images, self.seed, self.chosen = images, seed, None
        if fraction < 1:
            shuffled = np.random.default_rng(seed).permutation(len(images))
            by_class = shuffled[np.argsort(images.targets[shuffled], kind="stable")]
            starts = np.cumsum([0, *images.counts()])
            self.chosen = np.sort(
                np.concatenate(
                    [
                        by_class[start : start + max(1, round(fraction * (end - start)))]
                        for start, end in zip(starts[:-1], starts[1:], strict=True)
                    ]
                )
            )
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.images if self.chosen is None else self.chosen)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        seed_all(self.seed, epoch, index)
        return _first_readable(self._load, self._candidates(index), self._mark)

    def _load(self, index: int) -> tuple[Tensor, int]:
        return self.images[index if self.chosen is None else int(self.chosen[index])]

    def _candidates(self, index: int) -> Iterator[int]:
        while True:
            yield index
            index = int(torch.randint(len(self), ()))

    def _mark(self, index: int, error: BadImage) -> None:
        if not self.bad[index]:
            self.bad[index] = 1
            print(f"bad image, another takes its place: {error}", file=sys.stderr, flush=True)


def open_split(
    kind: type[Images], data_path: str, split: str, transform: Callable, pixels: Pixels, flat: bool = False
) -> Images:
    """data_path/split; flat: without classes, too, and data_path itself where it holds images and no such folder.
    Raises UserError, naming the folder, where it lacks images by class, or they have other channels."""
    folder = Path(data_path) / split
    if not folder.is_dir():
        if not (flat and _has_images(data_path)):
            raise UserError(f"no folder {folder}: --data_path must hold {split}/<class>/<images>")
        folder = Path(data_path)
    dataset = kind(folder, transform, pixels, flat)
    empty = [name for name, count in zip(dataset.classes, dataset.counts(), strict=True) if not count]
    if empty:
        raise UserError(
            f"no images in {some(str(folder / name) for name in empty)}: add some or remove the folder. Images end in "
            f"{', '.join(EXTENSIONS)}"
        )
    try:
        load_array(dataset.samples[0][0], pixels.exif, pixels.channels)
    except WrongChannels as error:
        raise UserError(str(error)) from error
    except BadImage:
        pass  # training has its own way with those
    return dataset


def some(names: Iterator[str] | list[str], shown: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def class_differences(here: list[str], there: list[str], here_name: str, there_name: str) -> str:
    """What only one of two lists of classes has, in words; empty where they are alike."""
    parts = [
        f"only in {name}: {some(sorted(set(mine) - set(other)))}"
        for name, mine, other in ((here_name, here, there), (there_name, there, here))
        if set(mine) - set(other)
    ]
    return "; ".join(parts)


def check_classes(train: Images | None, val: Images, nb_classes: int) -> None:
    """Raise UserError unless both splits have the same classes, as many as the head."""
    if train and train.classes != val.classes:
        differing = class_differences(train.classes, val.classes, str(train.root), str(val.root))
        raise UserError(f"the classes of train and val differ. {differing}. Both need the same folders")
    if len(val.classes) != nb_classes:
        raise UserError(
            f"{val.root} has {len(val.classes)} classes and --nb_classes is {nb_classes}: "
            f"pass --nb_classes {len(val.classes)}"
        )

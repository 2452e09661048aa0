"""Folders of images, and the loaders over them.

    data_path/train/<class>/*.jpg
    data_path/val/<class>/*.jpg
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import dist
from util.errors import LocalError, UserError
from util.images import BadImage, load_rgb
from util.signals import shield_worker


class Images(ImageFolder):
    """One split: (picture, class) by index. Hidden files and folders (.DS_Store, ._a.jpg) are left out."""

    def __init__(self, root: Path, transform: Callable, exif: bool) -> None:
        super().__init__(
            root, transform, loader=partial(load_rgb, exif=exif), is_valid_file=self._is_image, allow_empty=True
        )

    def _is_image(self, path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[len(str(self.root)) :]

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """The names of the class folders in order, and each one's number."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise UserError(f"{directory} has no class folders: it must hold <class>/<images>")
        return names, {name: number for number, name in enumerate(names)}


class EvalImages(Images):
    """A split where every image counts: a bad file is an error."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(index)
        except BadImage as error:
            raise LocalError(f"{error}; evaluation counts every image: mend or remove the file") from error


class TrainImages(Dataset):
    """A split to train on: (epoch, index) -> (picture, class).

    What is random about a sample follows from (seed, epoch, index) alone, so that it is the same in any process, at
    any time. A bad file is replaced by another image of the split, named on stderr, and marked in `bad` [images],
    which the loader's processes share.
    """

    TRIES = 100

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed
        self.bad = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with _own_random_numbers(self.seed, epoch, index):
            for _ in range(self.TRIES):
                try:
                    return self.images[index]
                except BadImage as error:
                    if not self.bad[index]:
                        self.bad[index] = 1
                        print(f"bad image, another takes its place: {error}", file=sys.stderr, flush=True)
                    index = int(torch.randint(len(self), ()))
        raise LocalError(f"{self.TRIES} images in a row in {self.images.root} cannot be read: is the disk all right?")


@contextmanager
def _own_random_numbers(*key: int) -> Iterator[None]:
    """Seed what transforms draw from; without loader processes, give the training loop its own streams back."""
    in_main = get_worker_info() is None
    if in_main:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        if in_main:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class EpochSampler(Sampler):
    """This rank's (epoch, index) of the whole batches of an epoch, from any batch on.

    Batch k of all ranks together is the k-th stretch of the epoch's order, whichever the number of ranks. Written by
    hand: torch's DistributedSampler begins at the beginning and repeats images to make the ranks' shares equal.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps = images // (batch_size * dist.world_size())
        self.images_per_epoch = self.steps * batch_size * dist.world_size()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Which epoch comes next, and how many of its batches are done already."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        share = order[dist.rank() :: dist.world_size()][: len(self)]
        for index in share[self.first_step * self.batch_size :].tolist():
            yield self.epoch, index


def _open(kind: type[Images], data_path: str, split: str, transform: Callable, exif: bool) -> Images:
    """data_path/split. Raises UserError, naming the folder, where it lacks images by class."""
    folder = Path(data_path) / split
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data_path must hold {split}/<class>/<images>")
    dataset = kind(folder, transform, exif)
    filled = set(dataset.targets)
    empty = [name for number, name in enumerate(dataset.classes) if number not in filled]
    if empty:
        raise UserError(
            f"no images in {_some(str(folder / name) for name in empty)}: add some or remove the folder. Images end in "
            f"{', '.join(IMG_EXTENSIONS)}"
        )
    return dataset


def _some(names: Iterator[str] | list[str], shown: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def classclass_differences(here: list[str], there: list[str], here_name: str, there_name: str) -> str:
    """What only one of two lists of classes has, in words; empty where they are alike."""
    parts = [
        f"only in {name}: {_some(sorted(set(mine) - set(other)))}"
        for name, mine, other in ((here_name, here, there), (there_name, there, here))
        if set(mine) - set(other)
    ]
    return "; ".join(parts)


def class_differences(here: list[str], there: list[str], here_name: str, there_name: str) -> str:
    """What only one of two lists of classes has, in words; empty where they are alike."""
    parts = [
        f"only in {name}: {_some(sorted(set(mine) - set(other)))}"
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


def _loader(dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool, **more) -> DataLoader:
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        pin_memory=pin_mem and dist.default_device() == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Python 3.14's default, a server that forks, takes seconds to start and leaves orphans when the run is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # or each start of a loader would draw from the training loop's stream
        **more,
    )


def _start_worker(_: int) -> None:
    shield_worker()


def train_loader(
    data_path: str, transform: Callable, batch_size: int, num_workers: int, pin_mem: bool, seed: int, exif: bool
) -> DataLoader:
    """Shuffled batches of data_path/train, each rank a share of its own; the epoch's incomplete last batch is dropped.

    The sampler's set_epoch(epoch) gives every epoch its order. Raises UserError if not one batch can be filled.
    """
    images = _open(Images, data_path, "train", transform, exif)
    sampler = EpochSampler(len(images), batch_size, seed)
    if not sampler.steps:
        raise UserError(
            f"{len(images)} training images on {dist.world_size()} processes don't fill one batch of {batch_size}: "
            f"lower --batch_size to {len(images) // dist.world_size()} or less"
        )
    return _loader(TrainImages(images, seed), batch_size, num_workers, pin_mem, sampler=sampler, drop_last=True)


def eval_loader(dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool, share: bool) -> DataLoader:
    """Every image once and in order; with `share` each rank takes every world_size-th, without padding."""
    rank, world = (dist.rank(), dist.world_size()) if share else (0, 1)
    return _loader(dataset, batch_size, num_workers, pin_mem, sampler=range(rank, len(dataset), world))


def classifier_loaders(
    data_path: str,
    nb_classes: int,
    train_transform: Callable | None,
    eval_transform: Callable,
    batch_size: int,
    num_workers: int,
    pin_mem: bool,
    seed: int,
    share_eval: bool,
    exif: bool,
) -> tuple[DataLoader | None, DataLoader]:
    """Loaders over train/ (None without a train_transform) and val/, whose classes agree; errors as above."""
    train = None
    if train_transform:
        train = train_loader(data_path, train_transform, batch_size, num_workers, pin_mem, seed, exif)
    val_set = _open(EvalImages, data_path, "val", eval_transform, exif)
    check_classes(train.dataset.images if train else None, val_set, nb_classes)
    return train, eval_loader(val_set, batch_size, num_workers, pin_mem, share_eval)

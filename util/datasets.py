"""Folders of images, and the loaders over them.

    data_path/train/<class>/*.jpg
    data_path/val/<class>/*.jpg
"""

import os
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import ImageFolder

from util import dist
from util.errors import UserError


def image_folder(data_path: str, split: str, transform: Callable) -> ImageFolder:
    """data_path/split as an ImageFolder. Raises UserError, naming the folder, where it has no images by class."""
    folder = Path(data_path) / split
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --data_path must hold {split}/<class>/<images>")
    try:
        return ImageFolder(folder, transform)
    except FileNotFoundError as error:
        raise UserError(f"{folder} must hold {split}/<class>/<images>: {error}") from error


def check_classes(train: ImageFolder | None, val: ImageFolder, nb_classes: int) -> None:
    """Raise UserError unless both splits have the same classes and the head has room for them."""
    differing = sorted(set(train.classes) ^ set(val.classes)) if train else []
    if differing:
        raise UserError(f"the classes of {train.root} and {val.root} differ: {', '.join(differing[:10])}")
    if len(val.classes) > nb_classes:
        raise UserError(f"{val.root} has {len(val.classes)} classes: pass --nb_classes {len(val.classes)}")


def _loader(dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool, **more) -> DataLoader:
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        pin_memory=pin_mem and dist.default_device() == "cuda",
        persistent_workers=workers > 0,
        **more,
    )


def train_loader(dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool, seed: int) -> DataLoader:
    """Shuffled batches, each rank a share of its own; the epoch's incomplete last batch is dropped.

    The sampler's set_epoch(epoch) gives every epoch its order. Raises UserError if not one batch can be filled.
    """
    sampler = DistributedSampler(dataset, dist.world_size(), dist.rank(), shuffle=True, seed=seed)
    if len(sampler) < batch_size:
        raise UserError(
            f"{len(dataset)} training images on {dist.world_size()} processes don't fill one batch of "
            f"{batch_size}: lower --batch_size to {len(sampler)} or less"
        )
    return _loader(dataset, batch_size, num_workers, pin_mem, sampler=sampler, drop_last=True)


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
) -> tuple[DataLoader | None, DataLoader]:
    """Loaders over train/ (None without a train_transform) and val/, whose classes agree; errors as above."""
    train_set = image_folder(data_path, "train", train_transform) if train_transform else None
    val_set = image_folder(data_path, "val", eval_transform)
    check_classes(train_set, val_set, nb_classes)
    train = train_loader(train_set, batch_size, num_workers, pin_mem, seed) if train_set else None
    return train, eval_loader(val_set, batch_size, num_workers, pin_mem, share_eval)

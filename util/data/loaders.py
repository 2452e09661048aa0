"""Loaders over the splits: which image comes when, in whose share, and the batches on the device."""

import gc
import random
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.data.datasets import EvalImages, Images, SpareImages, TrainImages, check_classes, open_split
from util.data.images import Pixels
from util.distributed import dist, launchers
from util.distributed.signals import shield_worker
from util.errors import LocalError, UserError


@contextmanager
def _streams_kept(kept: bool) -> Iterator[None]:
    """Give the training loop its random streams back, where samples are made in its own process."""
    if not kept:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
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


class Normalise:
    """Images on the device, from 8 bits or float32 of 0 to 1 to the model's input; exactly ToTensor and Normalize.

    By hand: timm's PrefetchLoader divides by 255 last, which rounds otherwise; torchvision's function sends mean and
    std to the GPU with every batch, and waits.
    """

    def __init__(self, pixels: Pixels, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(x, device=device)[:, None, None] for x in (pixels.mean, pixels.std))

    def __call__(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W], from anywhere."""
        imgs = imgs.to(self.mean.device, non_blocking=True)
        return (imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs).sub(self.mean).div_(self.std)


class Feed:
    """A loader's batches on the device, normalised there unless the transform has done it: 8 bits are a quarter of the
    bytes to send."""

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        pixels: Pixels,
        done: bool = False,
    ) -> None:
        """done: normalised already."""
        self.done, self.normalise = done, Normalise(pixels, device)
        self.loader, self.device, self.dataset, self.sampler = loader, device, loader.dataset, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        while True:
            with _streams_kept(self.loader.num_workers == 0):
                batch = next(batches, None)
            if batch is None:
                return
            yield self._finished(batch[0]), batch[1].to(self.device, non_blocking=True)

    def _finished(self, imgs: Tensor) -> Tensor:
        return imgs.to(self.device, non_blocking=True) if self.done else self.normalise(imgs)

    def some(self, count: int) -> tuple[Tensor, list[str]]:
        """A few of the images, normalised, evenly spread over all there are, and their names."""
        chosen = spread(len(self.dataset), count)
        imgs, _ = collate([self.dataset[index] for index in chosen])
        return self._finished(imgs), [self.dataset.name(index) for index in chosen]


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] and classes [N]; where files of 8 and of more bits meet, all from 0 to 1."""
    imgs = [img for img, _ in samples]
    if len({img.dtype for img in imgs}) > 1:
        imgs = [img / 255 if img.dtype == torch.uint8 else img for img in imgs]
    return default_collate(imgs), torch.tensor([target for _, target in samples])


def in_step(loader: Sized) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The loader's batches; where the ranks' shares differ in length, None at the end of the shorter ones. Raises
    UserError at the end, on all ranks, where one of them met a LocalError."""
    longest, done, problem = max(dist.gather(len(loader))), 0, ""
    try:
        for batch in loader:
            yield batch
            done += 1
    except LocalError as error:
        problem = str(error)
    yield from [None] * (longest - done)
    if problems := list(filter(None, dist.gather(problem))):
        raise UserError(problems[0])


def spread(total: int, count: int) -> list[int]:
    """At most count numbers below total, evenly."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int).tolist()


def _loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    pin_mem: bool,
    device: torch.device,
    persistent: bool = True,
    **more,
) -> DataLoader:
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(num_workers, launchers.cores())
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,  # each of one thread: so torch sets them up
        pin_memory=pin_mem and device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        # Python 3.14's default, a server that forks, takes seconds to start and leaves orphans when the run is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=collate,
        generator=torch.Generator(),  # or each start of a loader would draw from the training loop's stream
        **more,
    )


def _start_worker(_: int) -> None:
    shield_worker()
    gc.freeze()  # what was inherited stays shared: a collection would write to every object's header


def train_loader(
    data_path: str,
    transform: Callable,
    batch_size: int,
    num_workers: int,
    pin_mem: bool,
    seed: int,
    pixels: Pixels,
    device: torch.device,
    fraction: float = 1.0,
    flat: bool = False,
) -> Feed:
    """Shuffled batches of data_path/train, each rank a share of its own; the epoch's incomplete last batch is dropped.

    The sampler's set_epoch(epoch) gives every epoch its order. Raises UserError if not one batch can be filled.
    """
    images = open_split(Images, data_path, "train", transform, pixels, flat)
    dataset = TrainImages(images, seed, fraction)
    sampler = EpochSampler(len(dataset), batch_size, seed)
    if not sampler.steps:
        raise UserError(
            f"{len(dataset)} training images on {dist.world_size()} processes don't fill one batch of {batch_size}: "
            f"lower --batch_size to {len(dataset) // dist.world_size()} or less"
        )
    loader = _loader(dataset, batch_size, num_workers, pin_mem, device, sampler=sampler, drop_last=True)
    return Feed(loader, device, pixels, getattr(transform, "normalised", False))


def eval_loader(
    dataset: Images, batch_size: int, num_workers: int, pin_mem: bool, device: torch.device, share: bool
) -> Feed:
    """Every image once and in order; with `share` each rank takes every world_size-th, without padding."""
    rank, world = (dist.rank(), dist.world_size()) if share else (0, 1)
    loader = _loader(dataset, batch_size, num_workers, pin_mem, device, sampler=range(rank, len(dataset), world))
    return Feed(loader, device, dataset.pixels)


def monitor_loaders(
    data_path: str,
    transform: Callable,
    batch_size: int,
    num_workers: int,
    pin_mem: bool,
    pixels: Pixels,
    device: torch.device,
) -> tuple[Feed | None, Feed]:
    """For pre-training to look at: up to 5,000 images of val/, None where there is no usable one, and up to 10,000 of
    train/, evenly spread, shared among the ranks."""

    def feed(split: str, count: int) -> Feed:
        images = open_split(SpareImages, data_path, split, transform, pixels, flat=True)
        share = spread(len(images), count)[dist.rank() :: dist.world_size()]
        loader = _loader(images, batch_size, num_workers, pin_mem, device, False, sampler=share)
        return Feed(loader, device, pixels)

    try:
        val = feed("val", 5000) if (Path(data_path) / "val").is_dir() else None
    except UserError as error:
        dist.say(f"warning: no monitoring on val/: {error}")
        val = None
    return val, feed("train", 10000)


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
    pixels: Pixels,
    device: torch.device,
    fraction: float = 1.0,
) -> tuple[Feed | None, Feed]:
    """Loaders over train/ (None without a train_transform) and val/, whose classes agree; errors as above."""
    train = None
    if train_transform:
        train = train_loader(
            data_path, train_transform, batch_size, num_workers, pin_mem, seed, pixels, device, fraction
        )
    val_set = open_split(EvalImages, data_path, "val", eval_transform, pixels)
    check_classes(train.dataset.images if train else None, val_set, nb_classes)
    return train, eval_loader(val_set, batch_size, num_workers, pin_mem, device, share_eval)

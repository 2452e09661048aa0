"""Loaders over the splits: which image comes when, in whose share, and the batches on the device."""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.data.datasets import EvalImages, Images, MonitorImages, TrainImages, check_classes, open_split
from util.data.images import Pixels
from util.distributed import dist, launchers
from util.distributed.signals import shield_worker
from util.errors import LocalError, UserError
from util.rng import preserve_rng


@dataclass(frozen=True)
class Loading:
    """How batches are loaded.

    Attributes:
        batch_size: Images per batch of a process.
        num_workers: Loader processes, at most one per core is used.
        pin_mem: Pin the memory of batches that go to a GPU.
        seed: Of the order and the augmentations.
        device: Where batches are sent.
    """

    batch_size: int
    num_workers: int
    pin_mem: bool
    seed: int
    device: torch.device


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


class DeviceLoader:
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
            with preserve_rng(self.loader.num_workers == 0):
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


def lockstep(loader: Sized) -> Iterator[tuple[Tensor, Tensor] | None]:
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


def _loader(dataset: Dataset, loading: Loading, sampler: Iterable, persistent: bool = True, **more) -> DataLoader:
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(loading.num_workers, launchers.cores())
    return DataLoader(
        dataset,
        loading.batch_size,
        sampler=sampler,
        num_workers=workers,  # each of one thread: so torch sets them up
        pin_memory=loading.pin_mem and loading.device.type == "cuda",
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
    pixels: Pixels,
    loading: Loading,
    *,
    fraction: float = 1.0,
    flat: bool = False,
) -> DeviceLoader:
    """Open shuffled batches of data_path/train, of which each rank has a share of its own.

    The epoch's incomplete last batch is dropped. The sampler's set_epoch(epoch) gives every epoch its order.

    Args:
        data_path: Holds train/<class>/<images>.
        transform: From an array [H, W, C] to a tensor [C, H, W].
        pixels: How files become the model's input.
        loading: How batches are loaded.
        fraction: Share of the images of every class to train on, chosen by the seed.
        flat: Images without class folders are taken, too.

    Raises:
        UserError: There are no images, or not one batch can be filled.
    """
    images = open_split(Images, data_path, "train", transform, pixels, flat)
    dataset = TrainImages(images, loading.seed, fraction)
    sampler = EpochSampler(len(dataset), loading.batch_size, loading.seed)
    if not sampler.steps:
        ranks = dist.world_size()
        raise UserError(
            f"{len(dataset)} training images on {ranks} processes don't fill one batch of {loading.batch_size}: lower "
            f"--batch_size to {len(dataset) // ranks} or less"
        )
    loader = _loader(dataset, loading, sampler, drop_last=True)
    return DeviceLoader(loader, loading.device, pixels, getattr(transform, "normalised", False))


def eval_loader(dataset: Images, loading: Loading, distributed: bool) -> DeviceLoader:
    """Open every image once and in order; distributed: each rank takes every world_size-th, without padding."""
    rank, world = (dist.rank(), dist.world_size()) if distributed else (0, 1)
    loader = _loader(dataset, loading, range(rank, len(dataset), world))
    return DeviceLoader(loader, loading.device, dataset.pixels)


def monitor_loaders(
    data_path: str, transform: Callable, pixels: Pixels, loading: Loading
) -> tuple[DeviceLoader | None, DeviceLoader]:
    """Open images for monitoring pre-training: up to 5,000 of val/ and up to 10,000 of train/, evenly spread.

    The ranks share them. The first is None where there is no usable val/.
    """

    def open_loader(split: str, count: int) -> DeviceLoader:
        images = open_split(MonitorImages, data_path, split, transform, pixels, flat=True)
        share = spread(len(images), count)[dist.rank() :: dist.world_size()]
        return DeviceLoader(_loader(images, loading, share, persistent=False), loading.device, pixels)

    try:
        val = open_loader("val", 5000) if (Path(data_path) / "val").is_dir() else None
    except UserError as error:
        dist.print_rank0(f"warning: no monitoring on val/: {error}")
        val = None
    return val, open_loader("train", 10000)


def classifier_loaders(
    data_path: str,
    nb_classes: int,
    train_transform: Callable | None,
    eval_transform: Callable,
    pixels: Pixels,
    loading: Loading,
    *,
    fraction: float = 1.0,
    distributed_eval: bool = False,
) -> tuple[DeviceLoader | None, DeviceLoader]:
    """Open train/ and val/, whose classes must agree.

    Args:
        data_path: Holds train/<class>/<images> and val/<class>/<images>.
        nb_classes: Width of the head: so many classes there must be.
        train_transform: Of training images; None: train/ is not opened.
        eval_transform: Of validation images.
        pixels: How files become the model's input.
        loading: How batches are loaded.
        fraction: Share of the training images of every class, chosen by the seed.
        distributed_eval: The ranks share val/ rather than each evaluate all of it.

    Raises:
        UserError: As train_loader does; the classes differ.
    """
    train = None
    if train_transform:
        train = train_loader(data_path, train_transform, pixels, loading, fraction=fraction)
    val_set = open_split(EvalImages, data_path, "val", eval_transform, pixels)
    check_classes(train.dataset.images if train else None, val_set, nb_classes)
    return train, eval_loader(val_set, loading, distributed_eval)

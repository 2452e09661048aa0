"""Loaders over the splits: the order of the images, each rank's share of them, and batches on the device."""

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util import resources
from util.data.datasets import EvalImages, Images, MonitorImages, TrainImages, open_split, refuse_class_mismatch
from util.data.erasing import ErasableImage, erase_boxes, pack_boxes
from util.data.images import PixelSpec
from util.data.listing import UnreadableFolder
from util.data.splits import DataSpec, find_split, similar
from util.distributed import dist
from util.distributed.signals import shield_worker
from util.errors import LocalError, UserError
from util.rng import preserve_rng


@dataclass(frozen=True)
class Loading:
    """How batches are loaded.

    Attributes:
        batch_size: Images per batch of a process.
        num_workers: Loader processes; at most one per core of this process's share is started.
        pin_mem: Pin the memory of batches that go to a GPU.
        seed: Seed of the order and of the augmentations.
        device: Where batches are sent.
    """

    batch_size: int
    num_workers: int
    pin_mem: bool
    seed: int
    device: torch.device


class EpochSampler(Sampler):
    """Sampler of the keys (epoch, index) of the images that this rank loads in an epoch: shuffled, full batches only.

    An epoch can start at any of its batches; the sampler's length always counts this rank's images of the whole epoch.
    Taken together, the k-th batches of all ranks are the k-th section of the epoch's order, so that they hold the same
    images for any number of ranks with the same batch_size * ranks. torch's DistributedSampler is not used because it
    always starts at the first batch, and repeats images to make the ranks' shares equal.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        """Set up the sampler for epoch 0.

        Args:
            images: Number of images in the dataset.
            batch_size: Images per batch of a rank.
            seed: With the number of an epoch, determines its order.
        """
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps = images // (batch_size * dist.world_size())
        self.images_per_epoch = self.steps * batch_size * dist.world_size()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the next epoch; its first `first_step` batches, which are done already, are left out."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Every rank draws the same order and takes every world_size-th image of it.
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        share = order[dist.rank() :: dist.world_size()][: len(self)]
        for index in share[self.first_step * self.batch_size :].tolist():
            yield self.epoch, index


class Normalise:
    """Normalisation of images on the device, equal to torchvision's ToTensor and Normalize bit for bit.

    timm's PrefetchLoader is not used because it divides by 255 last, which rounds differently, and torchvision's
    function is not used because it sends mean and std to the GPU with every batch, and waits for the transfer.
    """

    def __init__(self, pixels: PixelSpec, device: torch.device) -> None:
        """Copy mean and standard deviation to the device."""
        self.mean, self.std = (torch.tensor(x, device=device)[:, None, None] for x in (pixels.mean, pixels.std))

    def __call__(self, imgs: Tensor) -> Tensor:
        """Return images [N, C, H, W] on the device as (x - mean) / std; 8 bits are divided by 255 first."""
        imgs = imgs.to(self.mean.device, non_blocking=True)
        if imgs.dtype == torch.uint8:
            imgs = imgs.float() / 255
        return imgs.sub(self.mean).div_(self.std)


class DeviceLoader:
    """Loader that sends batches to the device before normalising them: 8 bits are a quarter of float32's bytes."""

    def __init__(self, loader: DataLoader, device: torch.device, pixels: PixelSpec) -> None:
        """Wrap a loader.

        Args:
            loader: Yields what collate returns.
            device: Where to send the batches.
            pixels: Mean and standard deviation to normalise with.
        """
        self.loader, self.dataset, self.sampler = loader, loader.dataset, loader.sampler
        self.device, self.normalise = device, Normalise(pixels, device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        while True:
            # Without loader processes, the augmentations would draw from the training loop's random streams.
            with preserve_rng(self.loader.num_workers == 0):
                batch = next(batches, None)
            if batch is None:
                return
            imgs, targets, *boxes = batch
            imgs = self.normalise(imgs)
            if boxes:
                places, values = boxes
                erase_boxes(imgs, places, values.to(self.device, non_blocking=True))
            yield imgs, targets.to(self.device, non_blocking=True)

    def sample_evenly(self, count: int) -> tuple[Tensor, list[str]]:
        """Return at most `count` images, normalised and evenly spread over the dataset, and their names."""
        chosen = spread(len(self.dataset), count)
        imgs, _ = collate([self.dataset[index] for index in chosen])
        return self.normalise(imgs), [self.dataset.name(index) for index in chosen]


class TrainLoader(DeviceLoader):
    """Loader of training batches that yields the same number on every rank, even if a rank can't load its images.

    A rank that can't load any more must not simply stop, since the others would wait for it. It stores the message in
    `problem` and yields void batches, of NaN, until all ranks stop together: with them, updates are skipped on every
    rank. Before the process's first batch, or with a single process, it raises the error instead.

    Attributes:
        problem: Why this rank can't load any more training images; "": it can.
        first_lost_batch: The first batch of the epoch that it could not load.
    """

    problem = ""
    first_lost_batch = 0
    last: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = len(self) - self.sampler.first_step
        try:
            for batch in super().__iter__():
                self.last, left = batch, left - 1
                yield batch
        except LocalError as error:
            if self.last is None or dist.world_size() == 1:
                raise
            self.problem, self.first_lost_batch = str(error), len(self) - left
        if self.problem:
            imgs, targets = self.last
            yield from [(torch.full_like(imgs, math.nan), targets)] * left

    def class_weights(self, kind: str) -> Tensor | None:
        """Return the classes' weights in the loss.

        Args:
            kind: "balanced" or "none".

        Returns:
            "balanced": a weight per class [C], images / (C * images of the class), which is 1 where all classes have
            equally many images. "none": None.
        """
        if kind == "none":
            return None
        counts = torch.from_numpy(self.dataset.counts()).float()
        return (counts.sum() / (len(counts) * counts)).to(self.device)


def collate(samples: list[tuple[Tensor | ErasableImage, int]]) -> tuple[Tensor, ...]:
    """Stack samples to a batch: images [N, C, H, W], class numbers [N], and the boxes to erase, if there may be some.

    If 8-bit and float32 images meet in a batch, the 8-bit ones become float32 from 0 to 1; the others are kept.

    Returns:
        The two tensors, or these and the two of pack_boxes.
    """
    imgs, boxes = [img for img, _ in samples], ()
    if isinstance(imgs[0], ErasableImage):
        boxes = pack_boxes([image.boxes for image in imgs])
        imgs = [image.img for image in imgs]
    if len({img.dtype for img in imgs}) > 1:
        imgs = [img / 255 if img.dtype == torch.uint8 else img for img in imgs]
    return default_collate(imgs), torch.tensor([target for _, target in samples]), *boxes


def lockstep(loader: DeviceLoader) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Yield the loader's batches, then None until every rank has yielded as often as the one with the most batches.

    Raises:
        UserError: A rank met a LocalError; raised at the end, on all ranks, so that none waits for another.
    """
    longest, done, problem = max(dist.all_gather(len(loader))), 0, ""
    try:
        for batch in loader:
            yield batch
            done += 1
    except LocalError as error:
        problem = str(error)
    yield from [None] * (longest - done)
    if problems := list(filter(None, dist.all_gather(problem))):
        raise UserError(problems[0])


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` whole numbers from 0 to total - 1, evenly spread."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int).tolist()


def data_loader(
    dataset: Dataset, loading: Loading, sampler: Iterable, persistent: bool = True, collate_fn: Callable = collate
) -> DataLoader:
    """Create torch's loader.

    Args:
        dataset: The images.
        loading: How batches are loaded.
        sampler: Yields the keys of the images, in order.
        persistent: Keep the loader processes from one epoch to the next.
        collate_fn: From the samples of a batch to the batch.
    """
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(loading.num_workers, resources.cores())
    return DataLoader(
        dataset,
        loading.batch_size,
        sampler=sampler,
        num_workers=workers,  # torch gives each process one thread
        pin_memory=loading.pin_mem and loading.device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        # Python 3.14's default, forkserver, takes seconds to start and leaves orphans when the run is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=collate_fn,
        generator=torch.Generator(),  # else each start of a loader would draw from the training loop's stream
    )


def _start_worker(_: int) -> None:
    shield_worker()
    gc.freeze()  # keeps inherited memory shared: a collection would write to every object's header


def train_loader(
    data: DataSpec,
    transform: Callable,
    pixels: PixelSpec,
    loading: Loading,
    *,
    fraction: float = 1.0,
    classes_optional: bool = False,
) -> TrainLoader:
    """Open shuffled batches of the training images, each rank's from its own share of the images.

    The sampler leaves an epoch's incomplete last batch out; its set_epoch(epoch) chooses the epoch's order.

    Args:
        data: The run's images.
        transform: From an array [H, W, C] to a tensor [C, H, W].
        pixels: How files become the model's input.
        loading: How batches are loaded.
        fraction: Share of the images of every class to train on, chosen by the seed.
        classes_optional: Also accept images without classes; all then count as one class.

    Returns:
        The loader, whose batches are (imgs [N, C, H, W], class numbers [N]) on the device.

    Raises:
        UserError: The folder does not hold images as it should, or too few to fill one batch on every rank.
    """
    images = open_split(Images, data, "train", transform, pixels, classes_optional=classes_optional)
    dataset = TrainImages(images, loading.seed, fraction)
    sampler = EpochSampler(len(dataset), loading.batch_size, loading.seed)
    if not sampler.steps:
        count, ranks = len(dataset), dist.world_size()
        if count < ranks:
            raise UserError(
                f"{count} training images can't be shared by {ranks} processes: start at most {count}, or add images"
            )
        shared = f" on {ranks} processes" if ranks > 1 else ""
        raise UserError(
            f"{count} training images{shared} don't fill one batch of {loading.batch_size}: lower --batch_size to "
            f"{count // ranks} or less"
        )
    loader = data_loader(dataset, loading, sampler)
    return TrainLoader(loader, loading.device, pixels)


def eval_loader(dataset: Images, loading: Loading, distributed: bool) -> DeviceLoader:
    """Open batches of a split in order, each image once.

    Args:
        dataset: The images.
        loading: How batches are loaded.
        distributed: Each rank takes every world_size-th image, without padding; otherwise each takes all.
    """
    rank, world = (dist.rank(), dist.world_size()) if distributed else (0, 1)
    loader = data_loader(dataset, loading, range(rank, len(dataset), world))
    return DeviceLoader(loader, loading.device, dataset.pixels)


def monitor_loaders(
    data: DataSpec, train: Images, transform: Callable, loading: Loading
) -> tuple[DeviceLoader | None, DeviceLoader]:
    """Open images to monitor pre-training with: up to 5,000 of val/ and up to 10,000 of train/, evenly spread.

    The images are divided among the ranks.

    Args:
        data: The run's images; val may be missing.
        train: The training images, as they were listed, with the pixels that the model takes.
        transform: From an array [H, W, C] to a tensor [C, H, W].
        loading: How batches are loaded.

    Returns:
        The loaders of val/ and of train/; the first is None if val/ is missing or, with a warning, unusable.

    Raises:
        UnreadableFolder: A folder in val/ can't be read.
    """

    def load_some(images: MonitorImages, count: int) -> DeviceLoader:
        share = spread(len(images), count)[dist.rank() :: dist.world_size()]
        # Monitoring is rare: its processes end with it, so that training has their memory.
        loader = data_loader(images, loading, share, persistent=False)
        return DeviceLoader(loader, loading.device, train.pixels)

    try:
        val = None
        if data.val_fraction or dist.run_on_rank0(lambda: find_split(data.path, "val") is not None):
            images = open_split(MonitorImages, data, "val", transform, train.pixels, classes_optional=True)
            val = load_some(images, 5000)
        else:
            hint = similar(data.path, "val")
            dist.print_rank0(f"notice: no val/ in {data.path}, so there will be no test_loss and no test_knn{hint}")
    except UnreadableFolder:
        raise
    except UserError as error:
        dist.print_rank0(f"warning: val/ is not used for monitoring: {error}")
        val = None

    # Training itself names its unreadable images: do not name them a second time.
    seen = MonitorImages(train.root, train.listing, transform, train.pixels)
    seen.announce = False
    return val, load_some(seen, 10000)


def classifier_loaders(
    data: DataSpec,
    nb_classes: int,
    train_transform: Callable | None,
    eval_transform: Callable,
    pixels: PixelSpec,
    loading: Loading,
    *,
    fraction: float = 1.0,
    distributed_eval: bool = False,
) -> tuple[TrainLoader | None, DeviceLoader]:
    """Open the loaders of train and val, whose classes must agree.

    Args:
        data: The run's images.
        nb_classes: Number of outputs of the head, which must be the number of classes in training.
        train_transform: Transform of training images; None: train/ is not opened.
        eval_transform: Transform of validation images.
        pixels: How files become the model's input.
        loading: How batches are loaded.
        fraction: Share of the images of every class to train on, chosen by the seed.
        distributed_eval: Divide val/ among the ranks; otherwise each rank evaluates all of it.

    Returns:
        The loaders of train/ (None if it was not opened) and of val/.

    Raises:
        UserError: As in train_loader, for val/, too; or the classes differ, or their number is not nb_classes.
    """
    train = None
    if train_transform:
        train = train_loader(data, train_transform, pixels, loading, fraction=fraction)
    val_set = open_split(EvalImages, data, "val", eval_transform, pixels)
    if train:
        refuse_class_mismatch(train.dataset.images, val_set, nb_classes)
    return train, eval_loader(val_set, loading, distributed_eval)

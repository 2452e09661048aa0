"""Folders of images, and the loaders over them.

    data_path/train/<class>/*.jpg
    data_path/val/<class>/*.jpg

Pre-training also takes images without class folders, in data_path/train, or in data_path where there is no such folder.
"""

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import dist, gpu_decode, launch, listing
from util.errors import LocalError, UserError
from util.images import BadImage, Pixels, WrongChannels, load_array
from util.signals import shield_worker

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
TRIES = 100  # unreadable images in a row before the disk is suspected


def is_image(name: str) -> bool:
    """Whether a file's name is an image's; hidden ones (.DS_Store, ._a.jpg) are not."""
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


class Images(ImageFolder):
    """One split: (picture, class) by index. Hidden files and folders are left out."""

    def __init__(self, root: Path, transform: Callable, pixels: Pixels, flat: bool = False) -> None:
        """transform: from an array [H, W, C] to a tensor; flat: images in root itself are a class, all there is."""
        self.pixels, self.flat = pixels, flat
        read = partial(load_array, channels=pixels.channels)
        if isinstance(transform, gpu_decode.LaterCrop):
            read = gpu_decode.read
        super().__init__(root, transform, loader=partial(read, exif=pixels.exif))
        self.targets = self.samples.targets

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_, **__) -> listing.Listing:
        """All (path, class); rank 0 looks them up for all."""
        return dist.from_rank0(lambda: listing.of(directory, class_to_idx, is_image))

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
                dist.say(f"notice: images lie beside the folders in {directory}: all are taken, without classes")
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
            raise LocalError(f"{error}; evaluation counts every image: mend or remove the file") from error


class SpareImages(Images):
    """A split to look at: the next image takes the place of a bad one."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for number in range(index, index + TRIES):
            try:
                return super().__getitem__(number % len(self))
            except BadImage as error:
                problem = error
        raise LocalError(f"{problem}; so are {TRIES} images in a row: mend them, or look at none (--monitor_freq 0)")


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
            self.chosen = np.sort(np.concatenate([
                by_class[start : start + max(1, round(fraction * (end - start)))]
                for start, end in zip(starts[:-1], starts[1:], strict=True)
            ]))  # fmt: skip
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.images if self.chosen is None else self.chosen)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        _seed(self.seed, epoch, index)
        for _ in range(TRIES):
            try:
                return self.images[index if self.chosen is None else int(self.chosen[index])]
            except BadImage as error:
                if not self.bad[index]:
                    self.bad[index] = 1
                    print(f"bad image, another takes its place: {error}", file=sys.stderr, flush=True)
                index = int(torch.randint(len(self), ()))
        raise LocalError(f"{TRIES} images in a row in {self.images.root} cannot be read: is the disk all right?")


def _seed(*key: int) -> None:
    """Seed all that transforms draw from."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


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


def _open(
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
            f"no images in {_some(str(folder / name) for name in empty)}: add some or remove the folder. Images end in "
            f"{', '.join(EXTENSIONS)}"
        )
    try:
        load_array(dataset.samples[0][0], pixels.exif, pixels.channels)
    except WrongChannels as error:
        raise UserError(str(error)) from error
    except BadImage:
        pass  # training has its own way with those
    return dataset


def _some(names: Iterator[str] | list[str], shown: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


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


class Feed:
    """A loader's batches on the device, normalised there unless the transform has done it: 8 bits are a quarter of the
    bytes to send."""

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        gpu_size: tuple[int, int] | None = None,
        done: bool = False,
    ) -> None:
        """mean, std: per channel; gpu_size: of the crops that are still to be decoded; done: normalised already."""
        self.gpu_size, self.done = gpu_size, done
        self.loader, self.device, self.dataset, self.sampler = loader, device, loader.dataset, loader.sampler
        # Two lines by hand: timm's PrefetchLoader divides by 255 last, which rounds otherwise than ToTensor does.
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        while True:
            with _streams_kept(self.loader.num_workers == 0):
                batch = next(batches, None)
            if batch is None:
                return
            if self.gpu_size:
                batch = gpu_decode.crops(batch[0], self.gpu_size, self.device), batch[1]
            yield self.normalised(batch[0]), batch[1].to(self.device, non_blocking=True)

    def normalised(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W], of 8 bits or float32, on the device."""
        imgs = imgs.to(self.device, non_blocking=True)
        if self.done:
            return imgs
        return (imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs).sub(self.mean).div_(self.std)

    def some(self, count: int) -> tuple[Tensor, list[str]]:
        """A few of an ordered loader's images, evenly spread over all ranks' shares, and their names."""
        chosen = spread(len(self.dataset), count)
        imgs, _ = collate([self.dataset[index] for index in chosen])
        return self.normalised(imgs), [self.dataset.name(index) for index in chosen]


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] and classes [N]; where files of 8 and of more bits meet, all from 0 to 1."""
    imgs = [img for img, _ in samples]
    if len({img.dtype for img in imgs}) > 1:
        imgs = [img / 255 if img.dtype == torch.uint8 else img for img in imgs]
    return default_collate(imgs), torch.tensor([target for _, target in samples])


def in_step(loader: Sized, shared: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The loader's batches; where the ranks' shares differ in length, None at the end of the shorter ones. Raises
    UserError at the end, on all ranks, where one of them met a LocalError."""
    longest = int(dist.max_over_ranks(torch.tensor([len(loader)]), device)) if shared else len(loader)
    done, problem = 0, ""
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
    dataset: Dataset, batch_size: int, num_workers: int, pin_mem: bool, device: torch.device, persistent: bool = True,
    collate_fn: Callable = collate, **more,
) -> DataLoader:
    # More workers than cores only get in each other's way; the flag's default of 10 was made for big nodes.
    workers = min(num_workers, launch.cores())
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
        collate_fn=collate_fn,
        generator=torch.Generator(),  # or each start of a loader would draw from the training loop's stream
        **more,
    )


def _start_worker(_: int) -> None:
    shield_worker()
    gc.freeze()  # what was inherited stays shared: a collection would write to every object's header


def train_loader(
    data_path: str, transform: Callable, batch_size: int, num_workers: int, pin_mem: bool, seed: int, pixels: Pixels,
    device: torch.device, fraction: float = 1.0, flat: bool = False,
) -> Feed:
    """Shuffled batches of data_path/train, each rank a share of its own; the epoch's incomplete last batch is dropped.

    The sampler's set_epoch(epoch) gives every epoch its order. Raises UserError if not one batch can be filled.
    """
    images = _open(Images, data_path, "train", transform, pixels, flat)
    dataset = TrainImages(images, seed, fraction)
    sampler = EpochSampler(len(dataset), batch_size, seed)
    if not sampler.steps:
        raise UserError(
            f"{len(dataset)} training images on {dist.world_size()} processes don't fill one batch of {batch_size}: "
            f"lower --batch_size to {len(dataset) // dist.world_size()} or less"
        )
    later = isinstance(transform, gpu_decode.LaterCrop)
    loader = _loader(
        dataset, batch_size, num_workers, pin_mem, device, sampler=sampler, drop_last=True,
        collate_fn=gpu_decode.collate if later else collate,
    )  # fmt: skip
    gpu_size = transform.crop.size if later else None
    return Feed(loader, device, pixels.mean, pixels.std, gpu_size, getattr(transform, "normalised", False))


def eval_loader(
    dataset: Images, batch_size: int, num_workers: int, pin_mem: bool, device: torch.device, share: bool
) -> Feed:
    """Every image once and in order; with `share` each rank takes every world_size-th, without padding."""
    rank, world = (dist.rank(), dist.world_size()) if share else (0, 1)
    loader = _loader(dataset, batch_size, num_workers, pin_mem, device, sampler=range(rank, len(dataset), world))
    return Feed(loader, device, dataset.pixels.mean, dataset.pixels.std)


def monitor_loaders(
    data_path: str, transform: Callable, batch_size: int, num_workers: int, pin_mem: bool, pixels: Pixels,
    device: torch.device,
) -> tuple[Feed | None, Feed]:
    """For pre-training to look at: up to 5,000 images of val/, None where there is no usable one, and up to 10,000 of
    train/, evenly spread, shared among the ranks."""

    def feed(split: str, count: int) -> Feed:
        images = _open(SpareImages, data_path, split, transform, pixels, flat=True)
        share = spread(len(images), count)[dist.rank() :: dist.world_size()]
        loader = _loader(images, batch_size, num_workers, pin_mem, device, False, sampler=share)
        return Feed(loader, device, pixels.mean, pixels.std)

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
    val_set = _open(EvalImages, data_path, "val", eval_transform, pixels)
    check_classes(train.dataset.images if train else None, val_set, nb_classes)
    return train, eval_loader(val_set, batch_size, num_workers, pin_mem, device, share_eval)

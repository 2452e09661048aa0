"""Inference on image files: the flags, files and preprocessing that the small scripts share.

main_predict.py, main_features.py and main_reconstruct.py see images as the evaluation of the checkpoint's job did.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from util import checks, options
from util.checkpoint.files import checkpoint_args
from util.data import listing, loaders, splits
from util.data.archives import ImagePath
from util.data.holdout import choose_held_out
from util.data.images import BadImage, PixelSpec, load_array
from util.data.transforms import CentreCrop
from util.disk import unwritable, unwritable_file
from util.distributed import dist
from util.errors import Incomplete, UserError, raise_problems


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the batch size, the device, and how an image is cropped and rotated."""
    add = parser.add_argument
    add("--batch_size", default=64, type=int, help="images per batch")
    add(
        "--crop_pct",
        type=float,
        help="side of the centre crop as a share of the resized image; default: as in the checkpoint's evaluation",
    )
    add(
        "--exif",
        action="store_true",
        help="rotate photographs as their EXIF orientation says; default: as in the checkpoint's evaluation",
    )
    options.add_size_limit(parser)
    options.add_num_workers(parser)
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")


def add_norm_pix_loss(parser: argparse.ArgumentParser) -> None:
    """Add --norm_pix_loss, for autoencoders in files that do not say how their targets were."""
    norm_help = "the targets were normalised; needed only for files that do not store it, such as mae_pretrain_*_full"
    parser.add_argument("--norm_pix_loss", action="store_true", help=norm_help)


def add_class_names(parser: argparse.ArgumentParser) -> None:
    """Add --class_names."""
    names_help = "names of the classes by their numbers, one per line or as JSON; default: the checkpoint's"
    parser.add_argument("--class_names", default="", metavar="FILE", help=names_help)


def check(args: argparse.Namespace) -> None:
    """Check the flags before any work.

    Args:
        args: The flags of `add_flags` and the script's --output; --separate and --pictures if the script has them.

    Raises:
        UserError: Flags are invalid, or the output can't be written or is an input; names all problems at once.
    """
    problems = checks.device_problems(args.device) + checks.range_problems(args) + checks.open_file_problems(args)

    # Inputs: the checkpoint, the names of classes, the images.
    images = getattr(args, "images", None) or [getattr(args, "data_path", "")]
    inputs = [args.resume, getattr(args, "class_names", ""), *images]

    # With --separate the output is a folder, else a file.
    separate = getattr(args, "separate", False)
    for name in ("output", "pictures"):
        path = getattr(args, name, None)
        if path is None:
            continue
        if reason := unwritable(path) if separate else unwritable_file(path):
            problems.append(f"--{name} {path} can't be written to: {reason}")
        problems += checks.replaced_input_problems(name, path, inputs)
    raise_problems(problems)


def refuse_replacing(outputs: Iterable[Path], files: list[ImagePath]) -> None:
    """Raise a UserError if a file that is to be written is an image, or an archive of images, that is read."""
    there = {output.resolve(): output for output in outputs if output.is_file()}
    if not there:
        return
    for path in {path if isinstance(path, Path) else path.archive for path in files}:
        if output := there.get(path.resolve()):
            raise UserError(f"{output} is one of the images, and would be replaced: choose another --output")


def find_images(
    paths: list[Path], num: int | None = None, val_fraction: float = 0, val_seed: int = 0
) -> list[ImagePath]:
    """List image files, and those that training would find in folders and archives.

    Args:
        paths: Files, which are taken whatever their names, archives, folders, and folders of archives.
        num: Largest number of files to return, evenly spread over the list; None: all.
        val_fraction: Leave out the files that a training would hold out of a folder or an archive with this share.
        val_seed: Seed of that choice.

    Raises:
        UserError: A path does not exist, an archive can't be read, or there are no images.
    """
    missing = [str(path) for path in paths if not listing.exists(path)]
    if missing:
        raise UserError(f"no such file or folder: {', '.join(missing)}")

    special = [str(path) for path in paths if not path.is_file() and not path.is_dir()]
    if special:
        raise UserError(f"neither a file nor a folder: {', '.join(special)}")
    files, left_out = [], listing.LeftOut()
    for path in paths:
        if val_fraction and path.is_dir() and splits.find_split(str(path), "train"):
            raise UserError(
                f"{path} holds train, of which --val_fraction holds out images: name {path / 'train'}, or its archive"
            )
        found = _find_at(path, left_out)
        files += _training_part(found, path, val_fraction, val_seed) if val_fraction else found
    if not files:
        there = left_out.sentence()
        raise UserError(
            f"no images in {', '.join(map(str, paths))}: name a folder that holds some, or the files "
            f"themselves.{there} {splits.ENDINGS}"
        )
    if left_out:
        print(f"notice: left out: {left_out}", file=sys.stderr)
    return [files[number] for number in loaders.spread(len(files), num or len(files))]


def archived_classes(path: Path) -> list[str] | None:
    """Return the names of the classes in an archive, or a folder of archives, by their numbers; None for others."""
    members = _list_archives(path)
    return members.classes if members else None


def _list_archives(path: Path) -> listing.Listing | None:
    """Return the images in an archive, or in a folder of archives; None for anything else."""
    is_archive = path.is_file() and path.name.lower().endswith((splits.ARCHIVE, *splits.OTHER_ARCHIVES))
    if not is_archive and not (path.is_dir() and splits.holds_archives(path)):
        return None
    return splits.list_split(splits.source_at(path), path.absolute().stem, classes_optional=True)


def _find_at(path: Path, left_out: listing.LeftOut) -> list[ImagePath]:
    """List the images of a file, folder or archive, and count in left_out what is not listed."""
    if members := _list_archives(path):
        left_out.endings += members.left_out.endings
        left_out.no_end += members.left_out.no_end
        return [member for member, _ in members]
    if path.is_file():
        return [path]
    files = []
    for folder, names in listing.walk(str(path), left_out):
        files += [path / folder / name for name in left_out.sort_out(names, splits.is_image)]
    return files


def _training_part(files: list[ImagePath], root: Path, val_fraction: float, val_seed: int) -> list[ImagePath]:
    """Return the files below a root that a training with --val_fraction does not hold out.

    They lie in class folders or, where there are files in the root itself, form one class, as in pre-training. If the
    root is an image file, it is the only image, and stays.
    """
    names = [file.relative_to(root) for file in files]
    flat = any(len(name.parts) < 2 for name in names)
    _, targets = np.unique(["" if flat else name.parts[0] for name in names], return_inverse=True)
    held_out = choose_held_out((os.fsencode(str(name)) for name in names), targets, val_fraction, val_seed)
    return [file for file, out in zip(files, held_out, strict=True) if not out]


@dataclass(frozen=True)
class Preprocessing:
    """Settings by which image files become batches for a trained model.

    Attributes:
        pixels: Channels, their mean and standard deviation, EXIF orientation.
        crop_pct: Side of the centre crop as a share of the resized image's; None: the default for the model's size.
        batch_size: Images per batch.
        device: Where batches are sent.
        num_workers: Loader processes, at most; none are started for a single batch.
    """

    pixels: PixelSpec
    crop_pct: float | None
    batch_size: int
    device: torch.device
    num_workers: int = 0


def preprocessing_as_trained(checkpoint: dict, channels: int, args: argparse.Namespace) -> Preprocessing:
    """Return the preprocessing with which a checkpoint's job evaluates, with the flags' batch size and device.

    Args:
        checkpoint: The loaded checkpoint.
        channels: Channels of the model's images.
        args: The flags of `add_flags`, which are parsed here, too. --crop_pct and --exif, if given, take precedence
            over the checkpoint. --max_megapixels is a matter of trust in the files at hand: only the flag counts.
    """
    flags = checkpoint_args(checkpoint)
    pixels = PixelSpec.from_args(flags, channels)
    pixels = pixels._replace(exif=args.exif or bool(flags.get("exif")), max_megapixels=args.max_megapixels)
    crop_pct = args.crop_pct or flags.get("crop_pct")
    return Preprocessing(pixels, crop_pct, args.batch_size, torch.device(args.device), args.num_workers)


class _Files(Dataset):
    """Image files as a model takes them, or in place of an unreadable one the reason."""

    def __init__(self, files: list[ImagePath], crop: CentreCrop, pixels: PixelSpec) -> None:
        self.files, self.crop, self.pixels = files, crop, pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.crop(load_array(self.files[index], self.pixels))
        except BadImage as error:
            return str(error)


def _collate(samples: list[Tensor | str]) -> tuple[Tensor | None, list[str]]:
    """Return a batch's readable images [M, C, H, W] (None if there are none), and the problem of each image or ""."""
    readable = [(sample, 0) for sample in samples if isinstance(sample, Tensor)]
    imgs = loaders.collate(readable)[0] if readable else None
    return imgs, [sample if isinstance(sample, str) else "" for sample in samples]


class Batches:
    """Batches of image files for a trained model; unreadable files are named on stderr, left out, and counted."""

    def __init__(self, files: list[ImagePath], size: tuple[int, int], preprocessing: Preprocessing) -> None:
        """Set up the batches.

        Args:
            files: The image files.
            size: Height and width of the model's images in pixels.
            preprocessing: Settings for loading, cropping and normalising.
        """
        self.files, self.preprocessing = files, preprocessing
        self.bad = self.not_finite = 0  # images that can't be read, and those for which the model's output is no use
        self.crop = CentreCrop(size, preprocessing.crop_pct)
        self.normalise = loaders.Normalise(preprocessing.pixels, preprocessing.device)

    def __iter__(self) -> Iterator[tuple[list[ImagePath], Tensor]]:
        """Yield each batch's files, and its images [N, C, H, W], normalised and on the device.

        Raises:
            UserError: At the end, if no file at all was readable.
        """
        self.bad = self.not_finite = 0
        rest = iter(self.files)
        for imgs, problems in self._loader():
            paths = [path for path, problem in zip(islice(rest, len(problems)), problems, strict=True) if not problem]
            for problem in filter(None, problems):
                self.bad += 1
                print(f"unreadable image, left out: {problem}", file=sys.stderr, flush=True)
            if imgs is not None:
                yield paths, self.normalise(imgs)
        if self.bad == len(self.files):
            raise UserError(f"none of {self.bad} images can be read (named above): fix them, or name others")

    def _loader(self) -> DataLoader:
        how, count = self.preprocessing, len(self.files)
        workers = min(how.num_workers, math.ceil(count / how.batch_size) - 1)
        loading = loaders.Loading(how.batch_size, workers, pin_mem=True, seed=0, device=how.device)
        files = _Files(self.files, self.crop, how.pixels)
        return loaders.data_loader(files, loading, range(count), persistent=False, collate_fn=_collate)

    def report_not_finite(self, values: Tensor, paths: list[ImagePath]) -> None:
        """Name on stderr, and count, the images for which a model's output is not finite.

        Args:
            values: The model's output for a batch [N, ...].
            paths: The batch's files.
        """
        finite = values.flatten(1).isfinite().all(dim=1).tolist()
        for path in (path for path, is_finite in zip(paths, finite, strict=True) if not is_finite):
            self.not_finite += 1
            print(f"the model's output is not finite: {path}", file=sys.stderr, flush=True)


def raise_if_incomplete(parts: list[Batches], output: Path) -> None:
    """Raise Incomplete if an output, which is written already, lacks images, or holds values that are not finite."""
    bad, total = sum(batches.bad for batches in parts), sum(len(batches.files) for batches in parts)
    problems = [f"{bad} of {total} images cannot be read (named above); {output} is made of the others"] if bad else []
    if not_finite := sum(batches.not_finite for batches in parts):
        problems.append(f"the model's output for {not_finite} of {total} images is not finite (named above)")
    if problems:
        raise Incomplete("; ".join(problems))

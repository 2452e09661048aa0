"""Images given on the command line, as evaluation sees them: what the scripts share that look at them."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from util.checkpoint.files import checkpoint_args
from util.checkpoint.output_dir import unwritable
from util.data import datasets, listing, loaders
from util.data.images import BadImage, Pixels, load_array
from util.data.transforms import CentreCrop
from util.distributed import dist
from util.errors import UserError
from util.options import device_problems


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Device, batches, and how an image is cut and turned."""
    add = parser.add_argument
    add("--batch_size", default=64, type=int)
    add("--crop_pct", type=float, help="share of the image kept; default: as in the checkpoint's evaluation")
    add("--exif", action="store_true", help="turn photographs as their EXIF orientation says; default: likewise")
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")


def check(args: argparse.Namespace) -> None:
    """Raise UserError with every problem of the flags, before any work."""
    problems = device_problems(args.device)
    if args.batch_size < 1:
        problems.append(f"--batch_size {args.batch_size} must be at least 1")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        problems.append(f"--crop_pct {args.crop_pct} must be greater than 0, and at most 1")
    into = args.output if getattr(args, "separate", False) else args.output.parent
    why = "it is a folder" if into != args.output and args.output.is_dir() else unwritable(into)
    if why:
        problems.append(f"--output {args.output} can't be written to: {why}")
    if problems:
        raise UserError("; ".join(problems))


def find(places: list[Path], num: int | None = None) -> list[Path]:
    """The image files, those in folders included as in training; num: evenly thinned. Raises UserError where there are
    none."""
    if missing := [str(place) for place in places if not place.exists()]:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    files = []
    for place in places:
        if place.is_file():
            files.append(place)
        else:
            found = ((folder, name) for folder, names in listing.walk(str(place)) for name in names)
            files += [place / folder / name for folder, name in found if datasets.is_image(name)]
    if not files:
        raise UserError(f"no images in {', '.join(map(str, places))}: {', '.join(datasets.EXTENSIONS)} wanted")
    return [files[number] for number in loaders.spread(len(files), num or len(files))]


@dataclass(frozen=True)
class Preprocessing:
    """How image files become batches for a trained model.

    Attributes:
        pixels: Channels, their mean and standard deviation, EXIF orientation.
        crop_pct: Share of the image that the centre crop keeps; None: the default for the model's size.
        batch_size: Images per batch.
        device: Where batches are sent.
    """

    pixels: Pixels
    crop_pct: float | None
    batch_size: int
    device: torch.device


def preprocessing_as_trained(checkpoint: dict, channels: int, args: argparse.Namespace) -> Preprocessing:
    """Return how the checkpoint's job took images; --crop_pct and --exif, where they are given, come first."""
    flags = checkpoint_args(checkpoint)
    pixels = Pixels.of(flags, channels)._replace(exif=args.exif or bool(flags.get("exif")))
    crop_pct = args.crop_pct or flags.get("crop_pct")
    return Preprocessing(pixels, crop_pct, args.batch_size, torch.device(args.device))


def batches(
    files: list[Path], size: tuple[int, int], preprocessing: Preprocessing
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield (files, imgs [N, C, H, W]), normalised and on the device.

    Raises:
        UserError: An image is unreadable.
    """
    pixels = preprocessing.pixels
    crop = CentreCrop(size, preprocessing.crop_pct)
    normalise = loaders.Normalise(pixels, preprocessing.device)
    for start in range(0, len(files), preprocessing.batch_size):
        part = files[start : start + preprocessing.batch_size]
        try:
            imgs, _ = loaders.collate([(crop(load_array(str(path), pixels.exif, pixels.channels)), 0) for path in part])
        except BadImage as error:
            raise UserError(f"{error}; fix or remove the file") from error
        yield part, normalise(imgs)

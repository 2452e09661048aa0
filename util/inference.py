"""Images given on the command line, as evaluation sees them: what the scripts share that look at them."""

import argparse
from collections.abc import Iterator
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


def pixels_as_trained(checkpoint: dict, channels: int, args: argparse.Namespace) -> Pixels:
    """How the checkpoint's job took images. Where the flags leave crop and EXIF open, they become that job's."""
    flags = checkpoint_args(checkpoint)
    args.crop_pct = args.crop_pct or flags.get("crop_pct")
    args.exif = args.exif or bool(flags.get("exif"))
    return Pixels.of(flags, channels)


def batches(
    files: list[Path], size: tuple[int, int], pixels: Pixels, args: argparse.Namespace
) -> Iterator[tuple[list[Path], Tensor]]:
    """(files, imgs [N, C, H, W] normalised, on the device), by the batch. Raises UserError for an unreadable image."""
    crop, normalise = CentreCrop(size, args.crop_pct), loaders.Normalise(pixels, torch.device(args.device))
    for start in range(0, len(files), args.batch_size):
        part = files[start : start + args.batch_size]
        try:
            imgs, _ = loaders.collate([(crop(load_array(str(path), args.exif, pixels.channels)), 0) for path in part])
        except BadImage as error:
            raise UserError(f"{error}; mend or remove the file") from error
        yield part, normalise(imgs)

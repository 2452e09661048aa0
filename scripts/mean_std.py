"""Compute the mean and standard deviation of a folder's pixels, for --mean and --std.

    python scripts/mean_std.py DIR/train --in_chans 13

All pixels of all images count (with --num N those of N images, evenly spread). The values are in the units that
training sees: 0 to 1 for files of 8 and 16 bits, else as they stand in the file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors, inference
from util.data.images import BadImage, load_array
from util.errors import UserError


def statistics(files: list[Path], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel, [C] each, over all pixels of the files, with bytes as 0 to 1.

    Raises:
        UserError: A file cannot be read, or has another number of channels.
    """
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for path in files:
        try:
            pixels = load_array(str(path), channels=channels)
        except BadImage as error:
            raise UserError(f"{error}; fix or remove the file, or pass its number of channels (--in_chans)") from error

        # Bytes become 0 to 1, as in training. Double precision, since the variance is a difference of large sums.
        values = pixels.reshape(-1, channels).astype(np.float64) / (255 if pixels.dtype == np.uint8 else 1)
        count += len(values)
        total += values.sum(0)
        squares += np.square(values).sum(0)

    # Rounding can leave the variance of a constant channel slightly below 0.
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def format_values(values: np.ndarray) -> str:
    """Format numbers for the command line, without exponents: argparse would take -1e-05 for a flag."""
    return " ".join(np.format_float_positional(x, 6, fractional=False, trim="-") for x in values)


def main(argv: list[str] | None = None) -> None:
    """Print --mean and --std with their values (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="folders of images, or image files")
    parser.add_argument("--in_chans", default=3, type=int, help="channels of the images")
    parser.add_argument("--num", type=int, help="number of images to use, evenly spread; default: all")
    args = parser.parse_args(argv)
    if args.in_chans < 1 or (args.num is not None and args.num < 1):
        raise UserError("--in_chans and --num must be at least 1")

    files = inference.find(args.folder, args.num)
    mean, std = statistics(files, args.in_chans)
    print(f"# {len(files)} images\n--mean {format_values(mean)} --std {format_values(std)}")


if __name__ == "__main__":
    errors.run(main)

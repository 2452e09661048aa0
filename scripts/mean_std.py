"""Compute the mean and standard deviation of a folder's pixels, for --mean and --std.

    python scripts/mean_std.py DIR/train --in_chans 13

All pixels of all images count; with --num N those of N images, evenly spread over the list; with --val_fraction those
of the images that training with this flag does not hold out. The values are in the units that training uses: 0 to 1 for
files of 8 and 16 bits, otherwise those of the file. Images that can't be read are named on stderr and left out; the
exit code is then 1.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import checks, errors, inference, options
from util.command_line import Parser
from util.data.archives import ImagePath
from util.data.datasets import TRIES
from util.data.images import BadImage, PixelSpec, load_array
from util.errors import UserError, raise_problems
from util.words import count_nouns

SIDE = 1024  # largest side in pixels of the blocks that are converted to double precision at a time


class Statistics:
    """Mean and standard deviation per channel of all pixels so far, in double precision, with bytes as 0 to 1.

    Attributes:
        count: Number of pixels.
        mean: Mean of each channel [C].
        squares: Sum of each channel's squared distances to its mean [C].
        low: Smallest value of each channel [C].
        high: Largest value of each channel [C].
    """

    def __init__(self, channels: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(channels), np.zeros(channels)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)

    def add(self, pixels: np.ndarray) -> None:
        """Add the pixels [H, W, C] of an image, of 8 bits or float32."""
        for block in _blocks(pixels):
            values = block.reshape(-1, block.shape[2]).astype(np.float64)
            values /= 255 if pixels.dtype == np.uint8 else 1
            self.low, self.high = np.minimum(self.low, values.min(0)), np.maximum(self.high, values.max(0))

            # Squares are taken of distances to the block's mean, and then moved to the mean of all: the difference of
            # two large sums would lose digits.
            mean, count = values.mean(0), self.count + len(values)
            distance = mean - self.mean
            self.squares += np.square(values - mean).sum(0) + np.square(distance) * (self.count * len(values) / count)
            self.mean += distance * (len(values) / count)
            self.count = count

    def std(self) -> np.ndarray:
        """Return the standard deviation of each channel [C]; exactly 0 for channels that never change."""
        return np.where(self.low == self.high, 0, np.sqrt(self.squares / self.count))


def _blocks(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an image [H, W, C] in blocks of at most SIDE x SIDE pixels."""
    for top in range(0, pixels.shape[0], SIDE):
        for left in range(0, pixels.shape[1], SIDE):
            yield pixels[top : top + SIDE, left : left + SIDE]


def statistics(files: list[ImagePath], pixels: PixelSpec) -> tuple[Statistics, int]:
    """Read images; return their statistics, and how many of them could not be read, which stderr names.

    Raises:
        UserError: No image can be read, or none of the first TRIES.
    """
    result, unreadable, named = Statistics(pixels.channels), [], 0
    for path in files:
        try:
            result.add(load_array(path, pixels))
        except BadImage as error:
            unreadable.append(str(error))
            if not result.count and len(unreadable) >= min(TRIES, len(files)):
                raise UserError(
                    f"none of the first {len(unreadable)} images can be read, the last one being {error}. Fix or "
                    "remove the files, or pass their number of channels (--in_chans)"
                ) from error

        # Name them one by one as soon as an image was read; otherwise one message is enough.
        for message in unreadable[named:] if result.count else []:
            print(f"unreadable image, left out: {message}", file=sys.stderr, flush=True)
            named += 1
    return result, len(unreadable)


def format_values(values: np.ndarray) -> str:
    """Format numbers for the command line, without exponents: argparse would take -1e-05 for a flag."""
    return " ".join(np.format_float_positional(x, 6, fractional=False, trim="-") for x in values)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags (argv defaults to the command line's).

    Raises:
        UserError: A number is out of range.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="+", help="folders or archives of images, or image files")
    add("--in_chans", default=3, type=int, help="channels of the images")
    add("--num", type=int, help="number of images to use, evenly spread; default: all")
    options.add_val_flags(parser)
    options.add_size_limit(parser)
    args = parser.parse_args(argv)
    problems = checks.range_problems(args)
    if args.num is not None and args.num < 1:
        problems.append(f"--num {args.num} must be at least 1")
    raise_problems(problems)
    return args


def main(argv: list[str] | None = None) -> None:
    """Print --mean and --std with their values (argv defaults to the command line's)."""
    args = get_args(argv)
    files = inference.find_images(args.folder, args.num, args.val_fraction, args.val_seed)
    result, unreadable = statistics(files, PixelSpec(args.in_chans, max_megapixels=args.max_megapixels))

    # Training divides by the standard deviation, so that of a constant channel can't be passed on as it is.
    std = result.std()
    constant = [str(number) for number in np.flatnonzero(std == 0) + 1]
    print(f"# {count_nouns(len(files) - unreadable, 'image')}")
    if constant:
        channels = f"channel {constant[0]} never changes" if len(constant) == 1 else "channels never change: "
        channels += ", ".join(constant) if len(constant) > 1 else ""
        print(f"# {channels}; instead of a standard deviation of 0, which training refuses, 1 is given")
    print(f"--mean {format_values(result.mean)} --std {format_values(np.where(std == 0, 1, std))}", flush=True)
    if unreadable:
        raise errors.Incomplete(
            f"{unreadable} of {len(files)} images could not be read (named above) and are left out of the figures"
        )


if __name__ == "__main__":
    errors.run(main)

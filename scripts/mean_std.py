"""Mean and standard deviation of the pixels of a folder's images, for --mean and --std.

    python scripts/mean_std.py DIR/train --in_chans 13

Over all pixels of all images (with --num of that many, evenly spread), in the units that training sees: 0 to 1 for
files of 8 and 16 bits, else as they are in the file.
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
    """Mean and standard deviation per channel, [C] each. Raises UserError for a file that cannot be read."""
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for path in files:
        try:
            pixels = load_array(str(path), channels=channels)
        except BadImage as error:
            raise UserError(f"{error}; fix or remove the file, or pass its number of channels") from error
        values = pixels.reshape(-1, channels).astype(np.float64) / (255 if pixels.dtype == np.uint8 else 1)
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def main(argv: list[str] | None = None) -> None:
    """Print the two flags (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--in_chans", default=3, type=int)
    parser.add_argument("--num", type=int, help="default: all")
    args = parser.parse_args(argv)
    if args.in_chans < 1 or (args.num is not None and args.num < 1):
        raise UserError("--in_chans and --num must be at least 1")
    files = inference.find(args.folder, args.num)
    mean, std = statistics(files, args.in_chans)
    # Without exponents: argparse takes -1e-05 for a flag.
    mean, std = (
        " ".join(np.format_float_positional(x, 6, fractional=False, trim="-") for x in values) for values in (mean, std)
    )
    print(f"# {len(files)} images\n--mean {mean} --std {std}")


if __name__ == "__main__":
    errors.run(main)

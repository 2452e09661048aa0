"""What the raw pixels alone are worth: logistic regression on a folder's training images, accuracy on the others.

    python scripts/pixel_baseline.py --data_path data/fashion_mnist

Pixels of the images' own size, standardised; scikit-learn's LogisticRegression (lbfgs), `pip install scikit-learn`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors
from util.data import datasets
from util.data.images import Pixels
from util.errors import UserError


def pixels(images: datasets.Images) -> tuple[np.ndarray, np.ndarray]:
    """[N, H*W*C] from 0 to 1, and classes [N]."""
    try:
        values = np.stack([images[index][0].ravel() for index in range(len(images))])
    except ValueError as error:
        raise UserError(f"{images.root} holds images of different sizes: this baseline wants one size") from error
    return values.astype(np.float32) / 255, images.targets


def main(argv: list[str] | None = None) -> None:
    """Print a JSON line (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--iterations", default=200, type=int)
    args = parser.parse_args(argv)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("this baseline needs scikit-learn: pip install scikit-learn") from error
    for split in ("train", "val"):
        if not (args.data_path / split).is_dir():
            raise UserError(f"no folder {args.data_path / split}: --data_path must hold {split}/<class>/<images>")
    sets = [datasets.EvalImages(args.data_path / split, None, Pixels()) for split in ("train", "val")]
    datasets.check_classes(*sets, len(sets[1].classes))
    (train, targets), (val, truth) = map(pixels, sets)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    found = LogisticRegression(max_iter=args.iterations).fit((train - mean) / std, targets)
    accuracy = 100 * found.score((val - mean) / std, truth)
    print(json.dumps({"test_acc1": accuracy, "iterations": int(found.n_iter_.max()), "images": len(targets)}))


if __name__ == "__main__":
    errors.run(main)

"""Train a logistic regression on raw pixels, as a baseline: fit on train/, accuracy on val/.

    python scripts/pixel_baseline.py --data_path data/fashion_mnist

All images must have one size. Their pixels are standardised; the classifier is scikit-learn's LogisticRegression
(lbfgs): `pip install scikit-learn`. A JSON line is printed.
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
    """Return the pixels of a split, [N, H*W*C] from 0 to 1, and its classes [N].

    Raises:
        UserError: The images differ in size.
    """
    try:
        values = np.stack([images[index][0].ravel() for index in range(len(images))])
    except ValueError as error:
        raise UserError(
            f"{images.root} holds images of different sizes, and this baseline needs one size: resize them"
        ) from error
    return values.astype(np.float32) / 255, images.targets


def main(argv: list[str] | None = None) -> None:
    """Fit the baseline and print its accuracy as a JSON line (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path",
        type=Path,
        required=True,
        help="folder of train/ and val/, or of archives",
    )
    parser.add_argument("--iterations", default=200, type=int, help="largest number of lbfgs iterations")
    args = parser.parse_args(argv)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("this baseline needs scikit-learn: pip install scikit-learn") from error

    # Both splits must be there, with the same classes.
    train_images, val_images = (
        datasets.open_split(datasets.EvalImages, args.data_path, split, None, Pixels()) for split in ("train", "val")
    )
    datasets.check_classes(train_images, val_images, len(val_images.classes))

    # Standardise both splits by the statistics of the training images, fit on the one and score on the other.
    (train, train_targets), (val, val_targets) = pixels(train_images), pixels(val_images)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    classifier = LogisticRegression(max_iter=args.iterations).fit((train - mean) / std, train_targets)
    accuracy = 100 * classifier.score((val - mean) / std, val_targets)
    iterations = int(classifier.n_iter_.max())
    print(json.dumps({"test_acc1": accuracy, "iterations": iterations, "images": len(train_targets)}))


if __name__ == "__main__":
    errors.run(main)

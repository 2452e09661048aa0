"""Classify raw pixels, as baselines for what an encoder adds: fit on train/, accuracy on val/.

    python scripts/pixel_baseline.py --data_path data/fashion_mnist

All images must have one size. Their pixels are standardised. One baseline is scikit-learn's LogisticRegression (lbfgs):
`pip install scikit-learn`. The other is the vote of the 20 nearest training images that main_features.py and
pre-training's monitoring use. A JSON line is printed: test_acc1 is the accuracy of the first, test_knn of the second.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import checks, errors, options
from util.command_line import Parser
from util.data import datasets
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.errors import UserError, raise_problems
from util.report import knn


def pixels(images: datasets.Images) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of a split [N, H*W*C], float32, of 8-bit images from 0 to 1, and its classes [N].

    Raises:
        UserError: The images differ in size.
    """
    # As in training, 8 bits are scaled to 0 to 1, and the values of float files are taken as they are.
    loaded = (images[index][0] for index in range(len(images)))
    values = [pixels / np.float32(255) if pixels.dtype == np.uint8 else pixels for pixels in loaded]
    if len({array.shape for array in values}) > 1:
        raise UserError(f"{images.root} holds images of different sizes, and this baseline needs one size: resize them")
    return np.stack(values).reshape(len(images), -1), images.targets


def main(argv: list[str] | None = None) -> None:
    """Fit the baselines and print their accuracies as a JSON line (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--data_path",
        type=Path,
        required=True,
        help="folder of train/ and val/, or of archives",
    )
    options.add_val_flags(parser)
    parser.add_argument("--iterations", default=200, type=int, help="largest number of lbfgs iterations")
    args = parser.parse_args(argv)
    problems = checks.range_problems(args)
    if args.iterations < 1:
        problems.append(f"--iterations {args.iterations} must be at least 1")
    raise_problems(problems)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("this baseline needs scikit-learn: pip install scikit-learn") from error

    # Both splits must be there, with the same classes.
    data = DataSpec(str(args.data_path), args.val_fraction, args.val_seed)
    train_images, val_images = (
        datasets.open_split(datasets.EvalImages, data, split, None, PixelSpec()) for split in ("train", "val")
    )
    datasets.refuse_class_mismatch(train_images, val_images, len(val_images.classes))
    if len(np.unique(train_images.targets)) < 2:
        raise UserError(f"{args.data_path} has images of one class, and this baseline needs two or more to tell apart")

    # Standardise both splits by the statistics of the training images.
    (train, train_targets), (val, val_targets) = pixels(train_images), pixels(val_images)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, val = (train - mean) / std, (val - mean) / std

    # Fit on the one and score on the other.
    classifier = LogisticRegression(max_iter=args.iterations).fit(train, train_targets)
    result = {
        "test_acc1": 100 * classifier.score(val, val_targets),
        "test_knn": knn.accuracy(*map(torch.from_numpy, (train, train_targets, val, val_targets))),
        "iterations": int(classifier.n_iter_.max()),
        "images": len(train_targets),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    errors.run(main)

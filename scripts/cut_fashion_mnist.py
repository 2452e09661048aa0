"""Cut samples/fashion_mnist out of Fashion-MNIST: the first 200 training and 200 test images of each class.

    apt-get install dataset-fashion-mnist
    python scripts/cut_fashion_mnist.py --source /usr/share/datasets/fashion-mnist --output samples/fashion_mnist

The source folder holds the four idx.gz files of https://github.com/zalandoresearch/fashion-mnist (MIT licence).
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["tshirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"]


def read_idx(path: Path) -> np.ndarray:
    """An idx.gz file of unsigned bytes as an array: magic (2 zero bytes, type 8, number of axes), sizes, values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is not an idx file of unsigned bytes")
    sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def cut(source: Path, prefix: str, output: Path, per_class: int) -> int:
    """Write the first per_class images of each class as output/<class>/<index in the source>.png; returns how many."""
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")  # [N, 28, 28]
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")  # [N]
    written = 0
    for label, name in enumerate(CLASSES):
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in np.flatnonzero(labels == label)[:per_class]:
            Image.fromarray(images[index]).save(folder / f"{index:05d}.png", optimize=True)
            written += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path("samples/fashion_mnist"))
    parser.add_argument("--per_class", type=int, default=200)
    args = parser.parse_args()
    for split, prefix in (("train", "train"), ("val", "t10k")):
        print(split, cut(args.source, prefix, args.output / split, args.per_class))


if __name__ == "__main__":
    main()

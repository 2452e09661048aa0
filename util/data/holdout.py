"""The images of a training split that are held out for validation."""

import hashlib
from collections.abc import Iterable

import numpy as np


def choose_held_out(names: Iterable[bytes], targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the images to hold out: those for which a hash of seed and name, as a number from 0 to 1, is small.

    So the choice for an image does not depend on the other images, and about the same share of every class is held out.
    There is one exception: a class of two or more images needs at least one for training and one for validation. If it
    has none for validation, the image with the smallest hash is held out; if it has none for training, the image with
    the largest hash is kept for training. The only image of a class is never held out.

    Args:
        names: Paths of the images, relative to the split [images].
        targets: Their class numbers [images].
        fraction: Share of the images to hold out.
        seed: Seed of the choice.

    Returns:
        Whether each image is held out [images].
    """
    # The first 64 bits of a hash, as a number from 0 to 1.
    key = str(seed).encode()
    digests = b"".join(hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
    scores = np.frombuffer(digests, dtype=">u8") / 2**64
    held_out = scores < fraction

    # Of every class, the images in order of their scores, and how many there are and are held out.
    order = np.lexsort((scores, targets))
    counts = np.bincount(targets)
    chosen = np.bincount(targets[held_out], minlength=len(counts))
    ends = np.cumsum(counts)

    several = counts > 1
    held_out[order[(ends - counts)[several & (chosen == 0)]]] = True
    held_out[order[(ends - 1)[(counts > 0) & (chosen == counts)]]] = False
    return held_out

"""Weighted k-nearest-neighbour classification of frozen features (k 20, cosine, temperature 0.07)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from util.distributed import dist

K, TEMPERATURE = 20, 0.07
LARGEST = 1 << 26  # similarities that are computed at a time


def nearest(train: Tensor, features: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours of features by cosine similarity.

    Args:
        train: Features to choose from [N, D], of length 1.
        features: Features whose neighbours are wanted [M, D], of length 1.
        k: Number of neighbours; fewer are returned if there are not so many.
        own: Index in `train` of each feature [M], so that none counts as its own neighbour; None: the features are not
            in `train`.

    Returns:
        Cosines and numbers in `train` [M, k], the nearest first.
    """
    cosine = features @ train.T
    if own is not None:
        cosine[torch.arange(len(own), device=cosine.device), own] = -2  # below any cosine
    return cosine.topk(min(k, len(train) - (own is not None)), dim=1)


def accuracy(
    train: Tensor, train_targets: Tensor, features: Tensor, targets: Tensor, chunk: int = 0, same: bool = False
) -> float:
    """Classify features by their nearest neighbours, and return the top-1 accuracy in per cent.

    A neighbour votes for its class with weight exp(cosine similarity / temperature).

    Args:
        train: Features of the labelled images [N, D].
        train_targets: Their classes [N].
        features: Features to classify [M, D].
        targets: Their true classes [M].
        chunk: Features that are compared with all neighbours at a time, which bounds the memory; 0: at most 1024, and
            fewer where there are more than 65,536 neighbours.
        same: The features are the labelled ones, and none may be its own neighbour.
    """
    # The product of normalised features is their cosine similarity.
    train = F.normalize(train.float(), dim=1)
    features = train if same else F.normalize(features.float(), dim=1)
    classes = int(max(train_targets.max(), targets.max())) + 1
    hidden = None if dist.rank() == 0 else True  # None: shown on a terminal
    correct, chunk = 0, chunk or max(1, min(1024, LARGEST // len(train)))
    for start in tqdm(range(0, len(features), chunk), "nearest neighbours", leave=False, disable=hidden):
        part = features[start : start + chunk]
        own = start + torch.arange(len(part), device=part.device) if same else None
        cosine, index = nearest(train, part, K, own)

        # Sum the neighbours' weights by class. The 1 cancels out, and keeps exp() from overflowing.
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, train_targets[index], ((cosine - 1) / TEMPERATURE).exp())
        correct += int((votes.argmax(dim=1) == targets[start : start + chunk]).sum())
    return 100 * correct / len(features)

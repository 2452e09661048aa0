"""Weighted k-nearest-neighbour classification of frozen features (k 20, cosine, temperature 0.07)."""

import torch
from torch import Tensor
from torch.nn import functional as F

K, TEMPERATURE = 20, 0.07


def accuracy(
    train: Tensor, train_targets: Tensor, features: Tensor, targets: Tensor, chunk: int = 1024, same: bool = False
) -> float:
    """Classify features by their nearest neighbours, and return the top-1 accuracy in per cent.

    A neighbour votes for its class with weight exp(cosine similarity / temperature).

    Args:
        train: Features of the labelled images [N, D].
        train_targets: Their classes [N].
        features: Features to classify [M, D].
        targets: Their true classes [M].
        chunk: Features that are compared with all neighbours at a time, which bounds the memory.
        same: The features are the labelled ones, and none may be its own neighbour.
    """
    # The product of normalised features is their cosine similarity.
    train, features = F.normalize(train.float(), dim=1), F.normalize(features.float(), dim=1)
    classes = int(max(train_targets.max(), targets.max())) + 1
    k, correct = min(K, len(train) - same), 0
    for start in range(0, len(features), chunk):
        cosine = features[start : start + chunk] @ train.T  # [chunk, N]
        if same:
            rows = torch.arange(len(cosine), device=cosine.device)
            cosine[rows, start + rows] = -2  # below any cosine

        # Sum the neighbours' weights by class. The 1 cancels out, and keeps exp() from overflowing.
        nearest, index = cosine.topk(k, dim=1)
        votes = torch.zeros(len(cosine), classes, device=cosine.device)
        votes.scatter_add_(1, train_targets[index], ((nearest - 1) / TEMPERATURE).exp())
        correct += int((votes.argmax(dim=1) == targets[start : start + chunk]).sum())
    return 100 * correct / len(features)

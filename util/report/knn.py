"""Weighted k-nearest-neighbour classification of frozen features (k 20, cosine, temperature 0.07)."""

import torch
from torch import Tensor
from torch.nn import functional as F

K, TEMPERATURE = 20, 0.07


def accuracy(
    train: Tensor, train_targets: Tensor, features: Tensor, targets: Tensor, chunk: int = 1024, same: bool = False
) -> float:
    """Top-1 (percent) of features [M, D] whose neighbours among train [N, D] vote for their classes, each with weight
    exp(cosine / temperature); chunk rows at a time. same: features are train, and no row is its own neighbour."""
    train, features = F.normalize(train.float(), dim=1), F.normalize(features.float(), dim=1)
    classes = int(max(train_targets.max(), targets.max())) + 1
    k, right = min(K, len(train) - same), 0
    for start in range(0, len(features), chunk):
        cosine = features[start : start + chunk] @ train.T  # [chunk, N]
        if same:
            rows = torch.arange(len(cosine), device=cosine.device)
            cosine[rows, start + rows] = -2
        nearest, index = cosine.topk(k, dim=1)
        votes = torch.zeros(len(cosine), classes, device=cosine.device)
        votes.scatter_add_(1, train_targets[index], ((nearest - 1) / TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == targets[start : start + chunk]).sum())
    return 100 * right / len(features)

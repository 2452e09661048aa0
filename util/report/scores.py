"""Figures of a classifier, from counts over every image: accuracy, balanced accuracy, macro F1, loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import dist


@dataclass(frozen=True)
class Evaluation:
    """Settings of a classifier's evaluation.

    Attributes:
        distributed: The ranks hold different images, whose counts are added up.
        head_names: Names of the heads of a sweep; None: the model has one head.
        confusion: CSV file for the confusion matrix, of the best head; "": none.
        best_by: Figure by which the best head is chosen.
    """

    distributed: bool = False
    head_names: list[str] | None = None
    confusion: str = ""
    best_by: str = "acc1"

    def new_scores(self, classes: int, device: torch.device) -> "Scores":
        """Return zero counts for the model's heads and so many classes, on the device of the logits."""
        return Scores(len(self.head_names or [""]), classes, device, confusion=bool(self.confusion))


class Scores:
    """Counts of what a classifier, or each of its heads, gets right, on the device until they are read.

    Attributes:
        sums: Top-5 hits and summed losses [heads, 2].
        hits: Right answers by class [heads, C].
        predicted: Answers by predicted class [heads, C].
        support: Images by class [C].
        table: Answers by class and predicted class [heads, C * C], where a confusion matrix is wanted.
    """

    def __init__(self, heads: int, classes: int, device: torch.device, confusion: bool) -> None:
        """Start with zeros.

        Args:
            heads: Number of heads.
            classes: Number of classes, C.
            device: Where the logits are.
            confusion: Count a confusion matrix, too.
        """
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(heads, 2, dtype=exact, device=device)
        self.hits, self.predicted = torch.zeros(2, heads, classes, dtype=torch.long, device=device)
        self.support = torch.zeros(classes, dtype=torch.long, device=device)
        self.table = torch.zeros(heads, classes**2 if confusion else 0, dtype=torch.long, device=device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch, without waiting for the device.

        Args:
            logits: [N, heads, C], float32.
            targets: Class numbers [N].
        """
        N, heads, C = logits.shape
        top = logits.topk(min(5, C), dim=2).indices  # [N, heads, 5]
        right = top == targets[:, None, None]
        losses = [F.cross_entropy(head, targets, reduction="sum") for head in logits.unbind(1)]
        self.sums += torch.stack([right.sum(dim=(0, 2)), torch.stack(losses)], dim=1)

        # Counts by class: scatter_add, since bincount would wait for the device.
        answers, by_head = top[..., 0].T, targets.expand(heads, N)  # [heads, N]
        ones = torch.ones_like(answers)
        self.hits.scatter_add_(1, by_head, right[..., 0].T.long())
        self.predicted.scatter_add_(1, answers, ones)
        self.support.scatter_add_(0, targets, ones[0])
        if self.table.numel():
            self.table.scatter_add_(1, by_head * C + answers, ones)

    def add_up(self) -> None:
        """Add up the counts of all ranks in place; all ranks must call.

        `table` is left out: it is large, and only the best head's is needed (`sum_table`).
        """
        for name in ("sums", "hits", "predicted", "support"):
            values = getattr(self, name)
            total = dist.sum_over_ranks(values.flatten().tolist(), values.device)
            setattr(self, name, torch.tensor(total, dtype=values.dtype, device=values.device).view(values.shape))

    def sum_table(self, head: int, distributed: bool) -> Tensor:
        """Return a head's confusion matrix [C, C], of all ranks together if `distributed`; all ranks must call then."""
        counts = self.table[head].tolist()
        if distributed:
            counts = dist.sum_over_ranks(counts, self.table.device)
        return torch.tensor(counts, dtype=torch.long).view(len(self.support), -1)

    def is_constant(self, head: int) -> bool:
        """Return whether a head gave all images, of several classes, the same answer."""
        return int((self.predicted[head] > 0).sum()) == 1 < int((self.support > 0).sum())

    def figures(self) -> list[dict[str, float]]:
        """Return each head's figures, all but the loss in per cent.

        acc1 and acc5 are the shares of images whose class is the first, or among the first five (with at most 5 classes
        that is 100). balanced_acc is the mean over the classes of the share of a class's images that are right.
        macro_f1 is the mean over the classes of 2 * right / (images + answers). Classes without images do not count; in
        macro_f1 they do where they were answered, as in scikit-learn.
        """
        support, images = self.support.cpu().double(), int(self.support.sum())
        figures = []
        for sums, hits, predicted in zip(self.sums.tolist(), self.hits.cpu(), self.predicted.cpu(), strict=True):
            recall = hits[support > 0] / support[support > 0]
            both = support + predicted
            f1 = 2 * hits[both > 0] / both[both > 0]
            figures.append(
                {
                    "acc1": 100 * int(hits.sum()) / images,
                    "acc5": 100 * sums[0] / images,
                    "loss": sums[1] / images,
                    "balanced_acc": 100 * float(recall.mean()),
                    "macro_f1": 100 * float(f1.mean()),
                }
            )
        return figures

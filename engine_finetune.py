"""One epoch of classifier training (fine-tuning and linear probing), and evaluation."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.amp import LossScaler
from util.data.loaders import DeviceLoader, lockstep
from util.disk import write_csv
from util.distributed import dist
from util.loop import Run
from util.report.meters import Meters
from util.report.scores import Evaluation, Scores
from util.updater import Updater


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: DeviceLoader,
    updater: Updater,
    epoch: int,
    *,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    run: Run | None = None,
    print_freq: int = 20,
) -> dict[str, float]:
    """Train the classifier on the epoch's remaining batches: all, unless the run was resumed within the epoch.

    Args:
        model: The classifier, in DDP where there are several ranks.
        criterion: Loss of (logits, targets); with mixup_fn the targets are [N, classes].
        loader: Yields (imgs [N, C, H, W], targets [N]), both on the device.
        updater: Turns losses into updates.
        epoch: Number of the epoch, from 0.
        mixup_fn: Mixes images and targets first.
        run: Logs, saves, and stops where it has to; None: progress lines are printed, and that is all.
        print_freq: Steps between progress lines.

    Returns:
        "loss" and "lr": the epoch's means over all ranks, without losses that are not finite.

    Raises:
        Stopped, FloatingPointError, UserError: As Run.after_update and Run.report do, on every rank.
    """
    model.train()
    meters = run.start_meters("loss", updater) if run else Meters(updater.device)

    # Every print_freq steps the iterator prints a line, and calls run.report.
    for step, (imgs, targets) in meters.log_every(loader, print_freq, epoch):
        with updater.micro_step(epoch, step, len(loader)):
            if mixup_fn:
                imgs, targets = mixup_fn(imgs, targets)
            # Under autocast the logits may have 16 bits: the loss is computed in float32.
            loss = criterion(model(imgs).float(), targets)
        skipped = updater.backward_and_update(loss)  # None inside an accumulation group

        meters.update(loss=loss, lr=updater.lr)
        if run and skipped is not None:
            run.after_update(step, skipped)  # an update was made or skipped: save on time or on a signal

    if run:
        run.end_of_training()
    return meters.averages()


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """Return the mean over the images of the cross-entropy, times the weight of each image's class.

    PyTorch's own weights are not used. Under label smoothing they weigh each class's part of an image's target, so that
    the parts of rare classes would outweigh the image's own class. And its mean divides by the sum of the weights,
    which differs from batch to batch: gradients would depend on how images are split among ranks and batches.

    Args:
        logits: [N, classes].
        targets: Class numbers [N], or class probabilities [N, classes]; an image's weight then is their weighted mean.
        class_weights: [classes], with a mean of 1 over the training images; None: all images weigh alike.
        smoothing: Label smoothing.
    """
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    if class_weights is not None:
        losses = losses * (class_weights[targets] if targets.ndim == 1 else targets @ class_weights)
    return losses.mean()


def head_losses(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the weighted cross-entropy; of several heads' logits [N, heads, classes] its sum over the heads.

    So each head gets the gradient that it would get alone. class_weights [classes] weigh the images by their classes.
    """
    heads = logits.unbind(1) if logits.ndim == 3 else [logits]
    return torch.stack([weighted_cross_entropy(head, targets, class_weights) for head in heads]).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    device: torch.device,
    scaler: LossScaler,
    settings: Evaluation | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Compute exact accuracies and mean cross-entropy over every image, each counted once.

    Prints the line `* Acc@1 83.664 Acc@5 96.530 loss 0.731`. A line with balanced accuracy and macro F1 precedes it,
    and before that, for a sweep, one line per head.

    Args:
        model: The classifier; with several heads its logits are [N, heads, classes].
        loader: Yields (imgs, targets) on the device, in batches of any size.
        device: Where the model is.
        scaler: Mixed precision.
        settings: How to evaluate; None: this process alone, one head, no confusion matrix.
        poll: Called once per batch, on all ranks equally often.

    Returns:
        acc1, acc5, loss, balanced_acc and macro_f1 (util/report/scores.py), of several heads those of the best, and
        each head's with _NAME after the key.

    Raises:
        UserError: An image can't be read, or the confusion matrix can't be written; on all ranks.
        Stopped: `poll` has met a signal.
    """
    model = dist.unwrap(model).eval()  # without DDP: ranks may have different numbers of batches
    # The ranks' BatchNorm statistics may differ by rounding: all use rank 0's, which checkpoints hold.
    dist.broadcast_from_rank0(model.buffers())
    settings = settings or Evaluation()
    scores = _count(model, loader, device, scaler, settings, poll)

    # Nothing has waited for the device so far; reading the counts does.
    figures = scores.figures()
    best = max(range(len(figures)), key=lambda head: figures[head][settings.best_by])
    if settings.confusion:
        table = scores.sum_table(best, settings.distributed)
        dist.run_on_rank0(lambda: write_confusion(Path(settings.confusion), table, loader.dataset.classes))

    remark = "; every image was given the same class" if scores.is_constant(best) else ""
    return _report(figures, best, settings.head_names, remark)


def _count(
    model: nn.Module,
    loader: DeviceLoader,
    device: torch.device,
    scaler: LossScaler,
    settings: Evaluation,
    poll: Callable[[], None] | None,
) -> Scores:
    """Count the model's answers on every image, those of all ranks together if the settings say so, as in evaluate."""
    scores = None
    for batch in lockstep(loader):
        if poll:
            poll()
        if batch is None:
            continue
        imgs, targets = batch
        with scaler.autocast():
            logits = model(imgs).float()
        logits = logits if settings.head_names else logits[:, None]  # [N, heads, classes]
        scores = scores or settings.new_scores(logits.shape[2], device)
        scores.update(logits, targets)

    # Where images are few, a rank may have had none: its counts are zeros.
    if settings.distributed:
        classes = max(dist.all_gather(len(scores.support) if scores else 0))
        scores = scores or settings.new_scores(classes, device)
        scores.add_up()
    return scores


def _report(figures: list[dict[str, float]], best: int, head_names: list[str] | None, remark: str) -> dict[str, float]:
    """Print each head's figures, then the best head's with a remark; return what evaluate returns."""
    stats = dict(figures[best])
    if head_names:
        for name, head in zip(head_names, figures, strict=True):
            dist.print_rank0(f"{name}: {_line(head)}")
            stats |= {f"{key}_{name}": value for key, value in head.items()}
    dist.print_rank0(f"balanced accuracy {stats['balanced_acc']:.3f} macro F1 {stats['macro_f1']:.3f}{remark}")
    dist.print_rank0(f"* {_line(stats)}")  # other programs read this line: its form stays
    return stats


def _line(stats: dict[str, float]) -> str:
    return f"Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"


def write_confusion(file: Path, table: Tensor, classes: list[str]) -> None:
    """Write the confusion matrix as CSV: a row per true class, a column per predicted class, then accuracy in per cent.

    Args:
        file: File to write.
        table: Counts by class and predicted class [C, C].
        classes: Names of the C classes.

    Raises:
        UserError: The file can't be written.
    """
    rows = [["class", *classes, "accuracy"]]
    for number, (name, counts) in enumerate(zip(classes, table.tolist(), strict=True)):
        accuracy = f"{100 * counts[number] / sum(counts):.2f}" if sum(counts) else ""  # none of a class without images
        rows.append([name, *counts, accuracy])
    write_csv(file, rows)

"""One epoch of classifier training (fine-tuning and linear probing), and evaluation."""

import csv
from collections.abc import Callable, Sized
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.amp import LossScaler
from util.checkpoint.output_dir import write_whole
from util.data.loaders import lockstep
from util.distributed import dist
from util.loop import Run
from util.report.meters import Meters
from util.updater import Updater


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Sized,
    updater: Updater,
    epoch: int,
    *,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    run: Run | None = None,
    print_freq: int = 20,
) -> dict[str, float]:
    """Train the classifier on every batch of the epoch that is left.

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
    meters = run.start_meters("loss") if run else Meters(updater.device)

    # Every print_freq steps the iterator prints a line, and calls run.report.
    for step, (imgs, targets) in meters.log_every(loader, print_freq, epoch):
        with updater.micro_step(epoch, step, len(loader)):
            if mixup_fn:
                imgs, targets = mixup_fn(imgs, targets)
            loss = criterion(model(imgs), targets)
        skipped = updater.backward(loss)  # None inside an accumulation group

        meters.update(loss=loss, lr=updater.lr)
        if run and skipped is not None:
            run.after_update(step, skipped)  # an update was made or skipped: save on time or on a signal

    if run:
        run.end_of_training()
    return meters.averages()


def head_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy; of several heads' logits [N, heads, classes] its sum over the heads.

    So each head gets the gradient that it would get alone.
    """
    if logits.ndim == 2:
        return F.cross_entropy(logits, targets)
    return torch.stack([F.cross_entropy(head, targets) for head in logits.unbind(1)]).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Sized,
    device: torch.device,
    scaler: LossScaler,
    distributed: bool = False,
    poll: Callable[[], None] | None = None,
    head_names: list[str] | None = None,
    confusion: str = "",
) -> dict[str, float]:
    """Compute exact top-1 and top-5 accuracy and mean cross-entropy over every image, each counted once.

    Prints the line `* Acc@1 83.664 Acc@5 96.530 loss 0.731`.

    Args:
        model: The classifier; with several heads its logits are [N, heads, classes].
        loader: Yields (imgs, targets) on the device, in batches of any size.
        device: Where the model is.
        scaler: Mixed precision.
        distributed: The ranks hold different images, whose counts are added up.
        poll: Called once per batch, on all ranks equally often.
        head_names: Names of the heads of a sweep; None: the model has one head. Every head's figures are printed and
            returned (acc1_NAME, acc5_NAME, loss_NAME); acc1, acc5 and loss are those of the head of best top-1.
        confusion: CSV file for the confusion matrix, of the best head; "": none.

    Returns:
        acc1 and acc5 in per cent (with at most 5 classes acc5 is 100), and loss; with head_names also each head's.
    """
    model = dist.unwrap(model).eval()  # without DDP: ranks may have different numbers of batches
    dist.broadcast_from_rank0(model.buffers())  # a probe's BatchNorm statistics
    images, exact = 0, torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(head_names or [""]), 3, dtype=exact, device=device)  # [heads, top-1 and top-5 and loss]
    C = len(loader.dataset.classes) if confusion else 0
    tables = torch.zeros(len(sums), C * C, dtype=torch.long, device=device)

    for batch in lockstep(loader):
        if poll:
            poll()
        if batch is None:
            continue
        imgs, targets = batch
        with scaler.autocast():
            logits = model(imgs).float()
        logits = logits if head_names else logits[:, None]  # [N, heads, classes]
        sums += _sums(logits, targets)
        if confusion:
            for table, predicted in zip(tables, logits.argmax(dim=2).unbind(1), strict=True):
                table += torch.bincount(targets * C + predicted, minlength=C * C)
        images += len(imgs)

    # Only here does anything wait for the device.
    counts = [images, *sums.flatten().tolist()]
    images, *counts = dist.sum_over_ranks(counts, device) if distributed else counts
    heads = [_stats(counts[i : i + 3], images) for i in range(0, len(counts), 3)]
    best = max(range(len(heads)), key=lambda head: heads[head]["acc1"])
    stats = dict(heads[best])
    if confusion:
        write_confusion(confusion, tables[best], loader.dataset.classes, distributed, device)
    for name, head in zip(head_names or [], heads if head_names else [], strict=True):
        dist.print_rank0(f"{name}: {_line(head)}")
        stats |= {f"{key}_{name}": value for key, value in head.items()}
    dist.print_rank0(f"* {_line(stats)}")
    return stats


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Count what each head got right in a batch, and sum its loss.

    logits [N, heads, classes], targets [N] -> [heads, top-1 and top-5 and loss].
    """
    ranked = logits.topk(min(5, logits.shape[2]), dim=2).indices == targets[:, None, None]  # [N, heads, k]
    losses = [F.cross_entropy(head, targets, reduction="sum") for head in logits.unbind(1)]
    return torch.stack([ranked[..., 0].sum(dim=0), ranked.sum(dim=(0, 2)), torch.stack(losses)], dim=1)


def write_confusion(file: str, table: Tensor, classes: list[str], distributed: bool, device: torch.device) -> None:
    """Write the confusion matrix as CSV: a row per true class, a column per predicted class, then accuracy in per cent.

    Args:
        file: To write to, on rank 0.
        table: This rank's counts [C * C], by class and predicted class.
        classes: Names of the C classes.
        distributed: Whether the ranks' counts are to be added up.
        device: Where the table is.
    """
    counts = dist.sum_over_ranks(table.tolist(), device) if distributed else table.tolist()
    rows = [["class", *classes, "accuracy"]]
    for number, name in enumerate(classes):
        row = counts[number * len(classes) : (number + 1) * len(classes)]
        rows.append([name, *map(int, row), f"{100 * row[number] / max(1, sum(row)):.2f}"])
    dist.run_on_rank0(lambda: _write_csv(Path(file), rows))


def _write_csv(file: Path, rows: list[list]) -> None:
    # Names of classes that are not UTF-8 are written with the bytes that they have on the disk.
    with (
        write_whole(file) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out,
    ):
        csv.writer(out).writerows(rows)


def _stats(sums: list[float], images: float) -> dict[str, float]:
    top1, top5, loss = sums
    return {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "loss": loss / images}


def _line(stats: dict[str, float]) -> str:
    return f"Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"

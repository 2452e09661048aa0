"""One epoch of classifier training (fine-tuning and linear probing), and evaluation."""

import csv
from collections.abc import Callable, Sized
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.amp import LossScaler
from util.checkpoint.output_dir import writing
from util.data.loaders import in_step
from util.distributed import dist
from util.loop import Run, train_epoch
from util.lr_sched import CosineSchedule


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Sized,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: LossScaler,
    schedule: CosineSchedule,
    *,
    accum_iter: int = 1,
    clip_grad: float | None = None,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    run: Run | None = None,
    print_freq: int = 20,
    on_update: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train the classifier on every batch (imgs [N, C, H, W], targets [N]; on the device) of the loader.

    mixup_fn mixes images and targets first. Accumulation, learning rate, result and errors: util.loop.train_epoch.
    """

    def loss_of(imgs: Tensor, targets: Tensor) -> Tensor:
        if mixup_fn:
            imgs, targets = mixup_fn(imgs, targets)
        return criterion(model(imgs), targets)

    return train_epoch(
        model,
        loader,
        optimizer,
        device,
        epoch,
        scaler,
        schedule,
        loss_of,
        accum_iter=accum_iter,
        clip_grad=clip_grad,
        run=run,
        loss_tag="loss",
        print_freq=print_freq,
        on_update=on_update,
    )


def head_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy; of several heads' logits [N, heads, classes] the sum over heads, so that each gets the gradient
    that it would get alone."""
    if logits.ndim == 2:
        return F.cross_entropy(logits, targets)
    return torch.stack([F.cross_entropy(head, targets) for head in logits.unbind(1)]).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Sized,
    device: torch.device,
    scaler: LossScaler,
    shared: bool = False,
    poll: Callable[[], None] | None = None,
    names: list[str] | None = None,
    confusion: str = "",
) -> dict[str, float]:
    """Exact top-1 and top-5 accuracy (percent; k at most the number of classes) and mean cross-entropy.

    Every image counts once, whatever the sizes of the batches; `shared` says that the ranks hold different images,
    whose counts are then added up. `poll` is called once per batch, on all ranks equally often. Prints the line
    `* Acc@1 83.664 Acc@5 96.530 loss 0.731`. Of several heads, whose names are given, every one is printed and
    returned (acc1_NAME), and the one of best top-1 stands for all. confusion: CSV file to write the counts of (class,
    predicted class) to, of that head.
    """
    model = dist.unwrap(model).eval()  # without DDP: ranks may have different numbers of batches
    dist.share(model.buffers())  # a probe's BatchNorm statistics
    images, exact = 0, torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(names or [""]), 3, dtype=exact, device=device)  # [heads, top-1 and top-5 and loss]
    C = len(loader.dataset.classes) if confusion else 0
    tables = torch.zeros(len(sums), C * C, dtype=torch.long, device=device)
    for batch in in_step(loader):
        if poll:
            poll()
        if batch is None:
            continue
        imgs, targets = batch
        with scaler.autocast():
            logits = model(imgs)
        for head, one in enumerate(logits.float().unbind(1) if names else [logits.float()]):
            ranked = one.topk(min(5, one.shape[1]), dim=1).indices == targets[:, None]  # [N, k]
            loss = F.cross_entropy(one, targets, reduction="sum")
            sums[head] += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss])
            if confusion:
                tables[head] += torch.bincount(targets * C + one.argmax(dim=1), minlength=C * C)
        images += len(imgs)
    counts = [images, *sums.flatten().tolist()]  # the first wait for the device
    images, *counts = dist.sum_over_ranks(counts, device) if shared else counts
    heads = [_stats(counts[i : i + 3], images) for i in range(0, len(counts), 3)]
    best = max(range(len(heads)), key=lambda head: heads[head]["acc1"])
    stats = dict(heads[best])
    if confusion:
        write_confusion(confusion, tables[best], loader.dataset.classes, shared, device)
    for name, head in zip(names, heads, strict=True) if names else ():
        dist.say(f"{name}: {_line(head)}")
        stats |= {f"{key}_{name}": value for key, value in head.items()}
    dist.say(f"* {_line(stats)}")
    return stats


def write_confusion(file: str, table: Tensor, classes: list[str], shared: bool, device: torch.device) -> None:
    """A row per class: how many were taken for each class, and the share that was right (percent). table [C * C], this
    rank's counts."""
    counts = dist.sum_over_ranks(table.tolist(), device) if shared else table.tolist()
    rows = [["class", *classes, "accuracy"]]
    for number, name in enumerate(classes):
        row = counts[number * len(classes) : (number + 1) * len(classes)]
        rows.append([name, *map(int, row), f"{100 * row[number] / max(1, sum(row)):.2f}"])
    dist.from_rank0(lambda: _write_csv(Path(file), rows))


def _write_csv(file: Path, rows: list[list]) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(rows)


def _stats(sums: list[float], images: float) -> dict[str, float]:
    top1, top5, loss = sums
    return {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "loss": loss / images}


def _line(stats: dict[str, float]) -> str:
    return f"Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"

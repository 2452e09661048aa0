"""One epoch of classifier training (fine-tuning and linear probing), and evaluation."""

from collections.abc import Callable, Iterator, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import dist
from util.amp import LossScaler
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
) -> dict[str, float]:
    """Train the classifier on every batch (imgs [N, C, H, W], targets [N]) of the loader.

    mixup_fn mixes images and targets first. Accumulation, learning rate, result and errors: util.loop.train_epoch.
    """

    def loss_of(imgs: Tensor, targets: Tensor) -> Tensor:
        imgs, targets = imgs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup_fn:
            imgs, targets = mixup_fn(imgs, targets)
        return criterion(model(imgs), targets)

    return train_epoch(
        model, loader, optimizer, device, epoch, scaler, schedule, loss_of,
        accum_iter=accum_iter, clip_grad=clip_grad, run=run, loss_tag="loss", print_freq=print_freq,
    )  # fmt: skip


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Sized,
    device: torch.device,
    scaler: LossScaler,
    shared: bool = False,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Exact top-1 and top-5 accuracy (percent; k at most the number of classes) and mean cross-entropy.

    Every image counts once, whatever the sizes of the batches; `shared` says that the ranks hold different images,
    whose counts are then added up. `poll` is called once per batch, on all ranks equally often. Prints the line
    `* Acc@1 83.664 Acc@5 96.530 loss 0.731`.
    """
    model = dist.unwrap(model).eval()  # without DDP: ranks may have different numbers of batches
    dist.share_buffers(model)
    sums = torch.zeros(4, dtype=torch.float64)  # images, top-1, top-5, loss
    for batch in _in_step(loader, shared, device):
        if poll:
            poll()
        if batch is None:
            continue
        imgs, targets = batch
        imgs, targets = imgs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with scaler.autocast():
            logits = model(imgs)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # [N, k]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        batch = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss])
        sums += torch.cat([torch.tensor([len(imgs)]), batch.cpu()]).double()
    images, top1, top5, loss = dist.sum_over_ranks(sums.tolist(), device) if shared else sums.tolist()
    stats = {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "loss": loss / images}
    dist.say(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats


def _in_step(loader: Sized, shared: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The loader's batches; where the ranks' shares differ in length, None at the end of the shorter ones."""
    yield from loader
    longest = int(dist.max_over_ranks(torch.tensor([len(loader)]), device)) if shared else len(loader)
    yield from [None] * (longest - len(loader))

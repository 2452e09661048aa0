"""Logs of a run: log.txt (a JSON line per epoch) and boards such as TensorBoard, all written by rank 0 only."""

import json
import math
from pathlib import Path

from torch import Tensor, nn

from util.checkpoint.files import effective_batch
from util.data.datasets import TrainImages
from util.data.loaders import TrainLoader
from util.disk import raise_write_errors, write_text_whole
from util.distributed import dist
from util.misc import Checkpoints
from util.report.boards import Board, TensorBoard, WeightsAndBiases, events_suffix
from util.report.flops import count_flops
from util.updater import updates_per_epoch
from util.words import count_nouns


class RunLog:
    """Writer of log.txt in output_dir, of TensorBoard events in log_dir, and of a run at Weights & Biases.

    Entries of the first two that were logged after the point from which a run resumes are removed, so that no step
    appears twice there.
    """

    def __init__(self, output_dir: str, log_dir: str, epoch: int, done: float) -> None:
        """Open the logs; all ranks must call.

        Args:
            output_dir: Folder of log.txt; "": none.
            log_dir: Folder of the TensorBoard events; "": none.
            epoch: Epoch in which the run starts or resumes.
            done: Share of that epoch that is trained already.
        """
        self.file: Path | None = None
        self.boards: list[Board] = []
        self.n_parameters = 0
        self.flops_per_image = 0.0
        self.held: list[tuple[float, dict[str, float]]] = []
        dist.run_on_rank0(lambda: self._open(output_dir, log_dir, epoch, done))

    def _open(self, output_dir: str, log_dir: str, epoch: int, done: float) -> None:
        self.file = Path(output_dir) / "log.txt" if output_dir else None
        self.boards = [TensorBoard(log_dir, epoch + done, events_suffix(output_dir, log_dir))] if log_dir else []

        # TensorBoard drops later steps by purge_step; from log.txt the lines of this and later epochs are removed here.
        if self.file and self.file.exists():
            text = self.file.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if _epoch_of(line) < epoch]
            write_text_whole(self.file, "".join(f"{line}\n" for line in kept))

    def mirror_to_wandb(self, args: dict) -> None:
        """Open the run at Weights & Biases that --wandb asks for, if it does; all ranks must call.

        Args:
            args: The run's flags.

        Raises:
            UserError: It can't be opened; on all ranks.
        """
        if args.get("wandb"):
            dist.run_on_rank0(lambda: self.boards.append(WeightsAndBiases(args["wandb"], args["output_dir"], args)))

    def write_summary(self, checkpoints: Checkpoints, loader: TrainLoader, lrs: list[float]) -> None:
        """Print what is about to be trained, and notices; keep the numbers of parameters and operations for later.

        Call it before `util.speed.prepare`.

        Args:
            checkpoints: The run's checkpoints, which know its model, precision and flags.
            loader: Training images.
            lrs: Learning rate after warm-up, of each head of a sweep.
        """
        model, args = checkpoints.model, checkpoints.args
        self._measure(model, args.get("mask_ratio"))
        work = f", {self.flops_per_image / 1e9:.3g} GFLOP per image" if self.flops_per_image else ""
        total = sum(p.numel() for p in model.parameters())
        dist.print_rank0(f"data      {describe_images(loader.dataset)}")
        dist.print_rank0(
            f"model     {args['model']}, {_count(total)} parameters, {_count(self.n_parameters)} of them trained{work}"
        )
        ranks = count_nouns(args["world_size"], "rank")
        parts = f"{effective_batch(args)} = {args['batch_size']} x {args['accum_iter']} x {ranks}"
        rates = f"learning rate{'s' if len(lrs) > 1 else ''} {', '.join(f'{lr:.3g}' for lr in lrs)}"
        updates = count_nouns(updates_per_epoch(len(loader), args["accum_iter"]), "update")
        dist.print_rank0(f"training  effective batch {parts}, {updates} per epoch, {rates}")
        dist.print_rank0(f"on        {loader.device}, amp {checkpoints.scaler.amp}")
        dist.print_rank0(f"output    {self.file.parent if self.file else 'none'}")
        self._print_notices(checkpoints, loader)

    def _measure(self, model: nn.Module, mask_ratio: float | None) -> None:
        """Count the trained parameters, and the operations of a training step per image; 0 and a notice if it fails."""
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        try:
            self.flops_per_image = count_flops(model, mask_ratio)
        except Exception as error:  # code that needs values, in a model of the user's, is no reason not to train it
            dist.print_rank0(f"notice: no TFLOP/s, since the model's operations could not be counted: {error}")

    def _print_notices(self, checkpoints: Checkpoints, loader: TrainLoader) -> None:
        """Say where an epoch has fewer batches than an update is made of, or leaves out many images."""
        args = checkpoints.args
        if args["accum_iter"] > len(loader):
            dist.print_rank0(
                f"notice: an epoch has {count_nouns(len(loader), 'batch', 'es')}, fewer than --accum_iter "
                f"{args['accum_iter']}: its one update is of {len(loader) * checkpoints.images_per_step} images, at a "
                f"rate that is meant for {effective_batch(args)}; pass --accum_iter {len(loader)}"
            )
        images, used = len(loader.dataset), loader.sampler.images_per_epoch
        if images - used > images / 10:
            dist.print_rank0(
                f"notice: each epoch leaves out {images - used} of the {images} images, others every time, because "
                "they don't fill a batch"
            )

    def write_scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Write values, by their tags, to the boards at a fractional epoch."""
        self._to_boards("scalars", epoch, values)

    def write_picture(self, epoch: float, tag: str, pixels: Tensor) -> None:
        """Write a picture, [3, H, W] of 8 bits, to the boards under a tag at a fractional epoch."""
        self._to_boards("picture", epoch, tag, pixels)

    def hold(self, epoch: float, values: dict[str, float]) -> None:
        """Hold an evaluation's values back until the next checkpoint (`flush_held`) or the end of the run (`close`).

        If they were written at once, a run that is interrupted before that checkpoint would evaluate again after it
        resumes, and write the same values a second time.
        """
        self.held.append((epoch, values))

    def flush_held(self) -> None:
        """Write the values that were held back, after a checkpoint was written."""
        for epoch, values in self.held:
            self.write_scalars(epoch, values)
        self.held = []
        self._to_boards("flush")

    def write_epoch(self, values: dict[str, float]) -> None:
        """Append an epoch's values, "epoch" among them, to log.txt as a JSON line; flush the boards.

        A value that is not finite becomes null, since JSON has no NaN and no infinity. All ranks must call.

        Raises:
            UserError: The line can't be written; on all ranks.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        dist.run_on_rank0(lambda: self._append(json.dumps(finite, allow_nan=False)))
        self._to_boards("flush")

    def _append(self, line: str) -> None:
        if self.file:
            with raise_write_errors(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def close(self) -> None:
        """Write the values that were held back, and close the boards."""
        self.flush_held()
        self._to_boards("close")

    def _to_boards(self, method: str, *values: object) -> None:
        """Call a method of every board; go on without one that fails, as on a full disk."""
        for board in list(self.boards):
            try:
                getattr(board, method)(*values)
            except Exception as error:  # of the board's thread, too, whatever it met
                self.boards.remove(board)
                dist.print_rank0(f"warning: no more {board.name}, since they can't be written: {error}")


def describe_images(dataset: TrainImages) -> str:
    """Return a phrase that counts the training images, and those that are held out for validation."""
    held_out = dataset.images.listing.held_out
    beside = f"; {held_out:,} more are held out for validation" if held_out else ""
    return f"{count_nouns(len(dataset), 'image')} in {dataset.images.root}{beside}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}"


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of log.txt; infinity for a line without one, such as one that a crash cut short."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf

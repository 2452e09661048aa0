"""What a run leaves behind for people: log.txt (a JSON line per epoch) and TensorBoard. Only rank 0 writes."""

import json
import math
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from util.checkpoint.output_dir import replace
from util.data.loaders import DeviceLoader
from util.distributed import dist
from util.misc import Checkpoints


class RunLog:
    """log.txt in output_dir, TensorBoard events in log_dir; either may be empty to have none.

    What a run that goes on had written after the point where it goes on is taken back, so that no step shows twice.
    """

    def __init__(self, output_dir: str, log_dir: str, epoch: int, done: float) -> None:
        """epoch: the one in which the run begins or goes on; done: the share of it that is trained already."""
        main = dist.rank() == 0
        self.file = Path(output_dir) / "log.txt" if main and output_dir else None
        self.board = SummaryWriter(log_dir, purge_step=int((epoch + done) * 1000)) if main and log_dir else None
        self.n_parameters = 0
        self.held: list[tuple[float, dict[str, float]]] = []
        if self.file and self.file.exists():
            kept = [line for line in self.file.read_text(encoding="utf-8").splitlines() if _epoch_of(line) < epoch]
            replace(self.file, "".join(f"{line}\n" for line in kept))

    def summary(self, checkpoints: Checkpoints, loader: DeviceLoader, lr: float) -> None:
        """Say what is about to be trained, and keep the number of trained parameters for log.txt.

        Args:
            checkpoints: Of the run: its model, precision and flags.
            loader: Training images.
            lr: Learning rate after warm-up.
        """
        model, args, ranks = checkpoints.model, checkpoints.args, dist.world_size()
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        batch = args["batch_size"] * args["accum_iter"] * ranks
        dist.print_rank0(f"data      {len(loader.dataset)} images in {loader.dataset.images.root}")
        dist.print_rank0(
            f"model     {args['model']}, {total / 1e6:.2f} M parameters, "
            f"{self.n_parameters / 1e6:.2f} M of them trained"
        )
        dist.print_rank0(
            f"training  effective batch {batch} on {ranks} process(es), lr {lr:.3g}, {loader.device}, "
            f"amp {checkpoints.scaler.amp}"
        )
        dist.print_rank0(f"output    {self.file.parent if self.file else 'none'}")

    def scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Values on TensorBoard's x axis of epoch * 1000, which lines up runs of different batch sizes."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, int(epoch * 1000))

    def picture(self, epoch: float, name: str, pixels: Tensor) -> None:
        """A picture, [3, H, W] of 8 bits, for TensorBoard."""
        if self.board:
            self.board.add_image(name, pixels, int(epoch * 1000))

    def hold(self, epoch: float, values: dict[str, float]) -> None:
        """As scalars, once a checkpoint remembers that the evaluation is done: it is repeated by a run that goes on
        from an earlier one."""
        self.held.append((epoch, values))

    def flush_held(self) -> None:
        """A checkpoint was written."""
        for epoch, values in self.held:
            self.scalars(epoch, values)
        self.held = []
        if self.board:
            self.board.flush()

    def epoch(self, values: dict[str, float]) -> None:
        """One line in log.txt."""
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.board:
            self.board.flush()

    def close(self) -> None:
        self.flush_held()
        if self.board:
            self.board.close()


def _epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that a crash cut short."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf

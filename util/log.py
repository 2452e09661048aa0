"""What a run leaves behind for people: log.txt (a JSON line per epoch) and TensorBoard. Only rank 0 writes."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from util import dist


class RunLog:
    """log.txt in output_dir, TensorBoard events in log_dir; either may be empty to have none."""

    def __init__(self, output_dir: str, log_dir: str) -> None:
        main = dist.rank() == 0
        self.file = Path(output_dir) / "log.txt" if main and output_dir else None
        self.board = SummaryWriter(log_dir) if main and log_dir else None
        self.n_parameters = 0
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def summary(self, name: str, model: nn.Module, images: int, device: torch.device, amp: str) -> None:
        """Say what is about to be trained, and keep the number of trained parameters for log.txt."""
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        dist.say(f"{name}: {self.n_parameters / 1e6:.2f} M trained parameters; {images} images; {device}, amp {amp}")

    def scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Values on TensorBoard's x axis of epoch * 1000, which lines up runs of different batch sizes."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, int(epoch * 1000))

    def epoch(self, values: dict[str, float]) -> None:
        """One line in log.txt."""
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.board:
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()

"""Boards that show a run while it trains: TensorBoard and Weights & Biases. A run writes to them on rank 0 only."""

import os
import secrets
import zlib
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from util.disk import is_utf8, write_text_whole
from util.errors import UserError

WANDB_ID = "wandb-id.txt"  # file in output_dir with the run's id at Weights & Biases


def events_suffix(output_dir: str, log_dir: str) -> str:
    """Return how the names of a run's TensorBoard files end in log_dir, which several runs may share.

    It is empty where log_dir is output_dir, which belongs to one run.
    """
    folder, logs = Path(output_dir).absolute(), Path(log_dir).absolute()
    return "" if folder == logs else f".{zlib.crc32(os.fsencode(folder)):08x}"


class Board(Protocol):
    """What a run writes to; `name` is for messages."""

    name: str

    def scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Write values, by their tags, at a fractional epoch."""

    def picture(self, epoch: float, tag: str, pixels: Tensor) -> None:
        """Write a picture [3, H, W] of 8 bits under a tag at a fractional epoch."""

    def flush(self) -> None:
        """Write what is buffered."""

    def close(self) -> None:
        """Write what is buffered, and end."""


class TensorBoard:
    """TensorBoard's events in a folder. The x axis is epoch * 1000, which aligns runs of different batch sizes."""

    name = "TensorBoard events"

    def __init__(self, folder: str, start: float, suffix: str) -> None:
        """Open the folder, which is made if needed.

        Args:
            folder: Where the events are written.
            start: Fractional epoch at which the run starts or resumes: TensorBoard hides events logged from there on.
            suffix: End of the file's name.
        """
        self.writer = SummaryWriter(_in_utf8(folder), purge_step=int(start * 1000), filename_suffix=suffix)

    def scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Write values, by their tags, at a fractional epoch."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, int(epoch * 1000))

    def picture(self, epoch: float, tag: str, pixels: Tensor) -> None:
        """Write a picture [3, H, W] of 8 bits under a tag at a fractional epoch."""
        self.writer.add_image(tag, pixels, int(epoch * 1000))

    def flush(self) -> None:
        """Write what is buffered."""
        self.writer.flush()

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, with the epoch as x axis; a run that is resumed goes on there, too.

    Written by hand because wandb 0.31's own `sync_tensorboard` writes every row twice, and takes 10 s to close.
    """

    name = "rows for Weights & Biases"

    def __init__(self, project: str, output_dir: str, flags: dict) -> None:
        """Open the run; its id is kept in output_dir.

        Args:
            project: Name of the project, or ENTITY/PROJECT.
            output_dir: The run's folder, where wandb keeps its files, too; "": a run that resumes is a new one there.
            flags: The run's flags, shown as its configuration.

        Raises:
            UserError: wandb can't open the run.
        """
        import wandb  # optional, and it takes a second

        entity, _, project = project.rpartition("/")
        self.picture_of = wandb.Image
        try:
            self.run = wandb.init(
                project=project,
                entity=entity or None,
                name=Path(output_dir).name or None,
                id=_run_id(output_dir),
                resume="allow",
                dir=output_dir or None,
                config=flags,
                reinit="finish_previous",
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise UserError(
                f"--wandb: Weights & Biases can't open a run ({error}): run `wandb login`, or set WANDB_MODE=offline "
                f"and run `wandb sync` later; if the run was deleted there, remove {Path(output_dir) / WANDB_ID}"
            ) from error
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")

    def scalars(self, epoch: float, values: dict[str, float]) -> None:
        """Write values, by their tags, at a fractional epoch."""
        self.run.log({**values, "epoch": epoch})

    def picture(self, epoch: float, tag: str, pixels: Tensor) -> None:
        """Write a picture [3, H, W] of 8 bits under a tag at a fractional epoch."""
        self.run.log({tag: self.picture_of(pixels.permute(1, 2, 0).numpy()), "epoch": epoch})

    def flush(self) -> None:
        """Do nothing: wandb's own process writes every row."""

    def close(self) -> None:
        """Write or send what is left, and end the run."""
        self.run.finish()


def _run_id(output_dir: str) -> str:
    """Return the run's id at Weights & Biases: the one that output_dir holds, or a new one, which is kept there."""
    file = Path(output_dir) / WANDB_ID
    if output_dir and file.exists():
        return file.read_text(encoding="ascii").strip()
    new = secrets.token_hex(4)
    if output_dir:
        write_text_whole(file, f"{new}\n")
    return new


def _in_utf8(folder: str) -> str:
    """Return a name of a folder that TensorBoard can open, although it encodes all names as UTF-8.

    If the folder's own name is not UTF-8, or the system uses another encoding for names, the folder is made if needed
    and opened, and Linux's ASCII name for the open folder (/proc/PID/fd/N) is returned.
    """
    if is_utf8(folder):
        return folder
    Path(folder).mkdir(parents=True, exist_ok=True)
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_RDONLY)}"

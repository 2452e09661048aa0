"""Checkpoints: what is in them, how they are written, and how they come back.

output_dir/
    checkpoint-{epoch}.pth          the state after an epoch
    checkpoint-last.pth             the newest state, in mid-epoch too

A checkpoint holds, all of it plain types and tensors (torch.load with weights_only=True opens it):
    model         parameters and buffers, under the names of the released weights
    model_config  the model's name and the arguments that build it
    optimizer, scaler, epoch (the last one completed; -1: none), args (a dict)
    amp           the precision: "bf16", "fp16" or "off"
    class_to_idx  classifiers only
    model_ema     the running average of the weights, with --model_ema
    position      of the epoch under way: images used, of how many, sums of what is averaged; the best accuracy and its
                  epoch
    stats         log.txt's line of the last epoch completed
    rng           the states of every rank's random streams
    job, saved    "pretrain", "finetune" or "linprobe"; when, in seconds since 1970
"""

import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from util.amp import LossScaler
from util.checkpoint.files import checkpoint_args, damage, digest_file, is_url, load_checkpoint, write
from util.checkpoint.formats import describe
from util.checkpoint.weights import load_model, plain
from util.distributed import dist
from util.errors import UserError
from util.rng import get_rng_state

# Flags that change how far a step of the schedule goes, or where it lies; with lr and the effective batch.
SCHEDULE = ("epochs", "warmup_epochs", "min_lr")
# Flags that say where and how a run goes on, not what it computes.
NEUTRAL_FLAGS = {
    "resume",
    "resume_override",
    "overwrite",
    "start_epoch",
    "eval",
    "output_dir",
    "log_dir",
    "save_freq",
    "keep",
    "save_minutes",
    "num_workers",
    "pin_mem",
    "device",
    "world_size",
    "local_rank",
    "dist_on_itp",
    "dist_url",
    "dist_eval",
    "dist_timeout",
    "shard",
    "compile",
    "attention",
    "grad_checkpoint",
    "monitor_freq",
}


@dataclass
class Position:
    """Where a run stands. `epoch` is the one under way; `images` of it, over all ranks, are used already."""

    epoch: int = 0
    images: int = 0
    dataset: int = 0  # images in the training set
    totals: dict[str, list[float]] = field(default_factory=dict)
    best: float = -1.0
    best_epoch: int = -1
    rng: list[dict] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)  # log.txt's line of the last epoch


class Checkpoints:
    """One run's checkpoints in output_dir; without output_dir nothing is written. All ranks call, rank 0 writes."""

    def __init__(
        self,
        output_dir: str,
        job: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        args: dict,
        class_to_idx: dict[str, int] | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        """model: without DDP; ema: the running average of its weights, if one is kept. args: the run's flags;
        args["model"] is its model's name, args["keep"] how many checkpoints of epochs stay (None: all)."""
        self.folder = Path(output_dir) if output_dir else None
        self.job, self.model, self.optimizer, self.scaler = job, model, optimizer, scaler
        self.args = {**args, "world_size": dist.world_size()}
        self.class_to_idx, self.ema = class_to_idx, ema
        self.newest = ""

    @property
    def images_per_step(self) -> int:
        """Images in a batch of all ranks."""
        return self.args["batch_size"] * dist.world_size()

    @property
    def goes_back(self) -> bool:
        """Whether the run was told to go on from a checkpoint of this folder that need not be its newest."""
        source = self.args.get("resume", "")
        return self.folder is not None and is_inside(source, self.folder) and Path(source).name != "checkpoint-last.pth"

    def prepare(self, source: str) -> None:
        """Make the folder ready for a run that starts (source "") or goes on from source: unfinished files of a run
        that was killed go, with --overwrite another run's checkpoints and log, too; without, its log gets another
        name."""
        if self.folder is None or dist.rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unwanted, log = ["checkpoint-*.tmp", "log.txt.tmp"], self.folder / "log.txt"
        if is_inside(source, self.folder):
            pass
        elif self.args.get("overwrite"):
            unwanted += ["checkpoint-*.pth", "log.txt", "events.out.tfevents.*", "reconstructions/epoch-*.png"]
        elif log.exists():
            log.rename(self.folder / f"log-{int(log.stat().st_mtime)}.txt")
        for pattern in unwanted:
            for file in self.folder.glob(pattern):
                file.unlink()
        for digest in self.folder.glob("checkpoint-*.pth.sha256"):
            if not digest.with_suffix("").exists():
                digest.unlink()

    def save(self, position: Position, whole_epoch: bool) -> None:
        """Write checkpoint-last.pth, and after a whole epoch (position.epoch) checkpoint-{epoch}.pth, too; then remove
        what --keep no longer wants. Raises UserError, on all ranks, where it can't be written."""
        rng = dist.gather(get_rng_state())
        if self.folder is None:
            return
        dist.gather_optimizer(self.optimizer)
        names = ["last"]
        if whole_epoch:
            names = [str(position.epoch), "last"]
            position = replace(position, epoch=position.epoch + 1, images=0, totals={})
        paths = [self.folder / f"checkpoint-{name}.pth" for name in names]

        def on_rank0() -> None:
            write(self._state(position, rng), paths)
            self._prune(position)

        dist.run_on_rank0(on_rank0)
        self.newest = str(paths[0])

    def _state(self, position: Position, rng: list[dict]) -> dict:
        state = {
            "model": self.model.state_dict(),
            "model_config": {"model": self.args["model"], **self.model.config},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "amp": self.scaler.amp,
            "epoch": position.epoch - 1,
            "args": self.args,
            "position": {
                name: value for name, value in asdict(position).items() if name not in ("epoch", "rng", "stats")
            },
            "stats": position.stats,
            "rng": rng,
            "job": self.job,
            "saved": time.time(),
        }
        state |= {"class_to_idx": self.class_to_idx} if self.class_to_idx is not None else {}
        return state | ({"model_ema": self.ema.state_dict()} if self.ema is not None else {})

    def _prune(self, position: Position) -> None:
        if self.args.get("keep") is None:
            return
        names = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in self.folder.iterdir())
        numbered = {int(found[1]): path for found, path in names if found}
        # A run that went back leaves later ones behind: they are not newer than its own.
        passed = sorted(epoch for epoch in numbered if epoch < position.epoch)
        for epoch in passed[: -self.args["keep"]]:
            if epoch != position.best_epoch:
                numbered[epoch].unlink()
                digest_file(numbered[epoch]).unlink(missing_ok=True)

    def resume(self, source: str, start_epoch: int = 0, override: bool = False, dataset: int = 0) -> Position:
        """Load model, optimiser and scaler, and say where to go on: at start_epoch without a source ("") and for a
        file of weights alone; dataset: images in the training set, whose order hangs on their number (0: unknown).
        Raises UserError where the file does not fit the model, the optimiser, the classes or, without override, the
        schedule."""
        if not source:
            return Position(start_epoch, dataset=dataset)
        checkpoint = load_checkpoint(source)
        load_model(source, checkpoint, self.model, self.args, self.class_to_idx)
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.get("model_ema") or self.model.state_dict())
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            what = describe(checkpoint)
            dist.print_rank0(
                f"weights from {source} ({what}), which holds no optimiser: starting at epoch {start_epoch}"
            )
            return Position(start_epoch, dataset=dataset)
        if checkpoint.get("job", self.job) != self.job:
            raise UserError(f"{source} is of another job, {checkpoint['job']}: pass it as --finetune to start from it")
        batch_changed = self._compare(source, checkpoint_args(checkpoint), override)
        state = checkpoint["optimizer"]
        try:
            for group, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
                # As today's flags say; the rate is the schedule's.
                group |= {name: value for name, value in own.items() if name not in ("params", "lr")}
            dist.load_optimizer(self.optimizer, state)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the optimiser state in {source} belongs to another job or model: {error}") from error
        self._keep_precision(checkpoint)
        self.scaler.load_state_dict(checkpoint.get("scaler") or {})
        self.newest = source
        position = Position(
            checkpoint["epoch"] + 1,
            **checkpoint.get("position", {}),
            rng=checkpoint.get("rng", []),
            stats=checkpoint.get("stats", {}),
        )
        # The sums of an epoch's beginning count batches: of the size that they had, not of today's.
        weight = checkpoint_args(checkpoint)["batch_size"] / self.args["batch_size"] if position.totals else 1
        position.totals = {name: [value * weight for value in pair] for name, pair in position.totals.items()}
        if batch_changed and position.images:
            dist.print_rank0(f"batch size changed: epoch {position.epoch} starts again")
            position.images, position.totals = 0, {}
        if dataset and position.dataset not in (0, dataset) and position.images:
            dist.print_rank0(
                f"{position.dataset} training images then, {dataset} now: epoch {position.epoch} starts again"
            )
            position.images, position.totals = 0, {}
        position.dataset = dataset
        where = f"epoch {position.epoch}, {position.images:,} images done"
        where = where if position.images else f"after epoch {checkpoint['epoch']}"
        dist.print_rank0(f"resuming from {source} ({where})")
        return position

    def _keep_precision(self, checkpoint: dict) -> None:
        """Go on in the precision that --amp auto chose when the run began, on the same kind of device."""
        stored, now = checkpoint_args(checkpoint).get("device"), self.args.get("device")
        same_device = stored and now and torch.device(stored).type == torch.device(now).type
        if self.args.get("amp") == "auto" and "amp" in checkpoint and same_device:
            self.scaler.use(checkpoint["amp"])

    def _compare(self, source: str, stored: dict, override: bool) -> bool:
        """List the flags that differ from the checkpoint's; refuse those that change the schedule. Returns whether the
        effective batch is another one."""
        if not stored:
            return True
        differing = [
            f"--{name} {stored[name]} -> {value}"
            for name, value in self.args.items()
            if name not in NEUTRAL_FLAGS and name in stored and plain(stored[name]) != plain(value)
        ]
        before, now = _schedule(stored), _schedule(self.args)
        changes = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changes and not override:
            raise UserError(
                f"the schedule is not that of {source}: {', '.join(changes)}. Take the flags it was made with, or pass "
                "--resume_override to resume with the new ones"
            )
        if differing:
            dist.print_rank0(f"flags that differ from the checkpoint's: {', '.join(differing)}")
        return before.get("effective batch") != now.get("effective batch")


def _schedule(args: dict) -> dict[str, object]:
    """What decides where a step lies in the schedule, and in the data's order."""
    found = {f"--{name}": args[name] for name in (*SCHEDULE, "seed") if name in args}
    if {"batch_size", "accum_iter", "world_size"} <= set(args):
        batch = found["effective batch"] = args["batch_size"] * args["accum_iter"] * args["world_size"]
        if "blr" in args:
            rates = args["blr"] if isinstance(args["blr"], list) else [args["blr"]]
            lrs = [blr * batch / 256 for blr in rates] if args.get("lr") is None else [args["lr"]]
            found["learning rate"] = ", ".join(f"{lr:.9g}" for lr in lrs)
    return found


def is_inside(source: str, folder: str | Path) -> bool:
    """Whether a checkpoint, or a link to it, lies directly in a folder."""
    if not source or is_url(source):
        return False
    return Path(folder).resolve() in (Path(source).parent.resolve(), Path(source).resolve().parent)


def resolve_resume(source: str, output_dir: str, job: str, model: str) -> str:
    """What --resume means: itself, or for "auto" the newest valid checkpoint of this job and model in output_dir, ""
    where there is none. Says which and why. Raises UserError where every checkpoint is broken or another run's."""
    return source if source != "auto" else dist.run_on_rank0(lambda: _newest(Path(output_dir), job, model))


def _newest(folder: Path, job: str, model: str) -> str:
    found, skipped = [], []
    for path in folder.glob("checkpoint-*.pth"):
        try:
            head = load_checkpoint(str(path), peek=True)
        except UserError as error:
            skipped.append(str(error))
            continue
        theirs = head.get("job", job), head.get("model_config", {}).get("model", model)
        if theirs != (job, model):
            skipped.append(f"{path} is of {theirs[1]}, {theirs[0]}")
        else:
            found.append((head.get("saved", path.stat().st_mtime), path.name == "checkpoint-last.pth", path))
    for *_, path in sorted(found, reverse=True):
        if problem := damage(path):
            skipped.append(problem)
            continue
        for reason in skipped:
            dist.print_rank0(f"warning: skipped: {reason}")
        dist.print_rank0(f"--resume auto: {path} is the newest valid checkpoint")
        return str(path)
    if skipped:
        raise UserError(
            f"--resume auto: no checkpoint in {folder} can be used:\n  "
            + "\n  ".join(skipped)
            + "\n  Choose another --output_dir, or pass no --resume and --overwrite to remove them and start afresh"
        )
    dist.print_rank0(f"--resume auto: no valid checkpoint in {folder}; starting from scratch")
    return ""

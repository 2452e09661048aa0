"""Checkpoints of a run: their contents, saving, retention and resuming.

output_dir/
    checkpoint-{epoch}.pth          the state after an epoch
    checkpoint-last.pth             the newest state, also within an epoch

A checkpoint holds plain types and tensors only, so that torch.load opens it with weights_only=True:
    model         parameters and buffers, under the names of the released weights
    model_config  the model's name and the arguments that build it
    optimizer, scaler, epoch (the last one completed; -1: none), args (a dict)
    amp           the precision: "bf16", "fp16" or "off"
    class_to_idx  classifiers only
    model_ema     the EMA of the weights, with --model_ema
    position      of the epoch under way: images used, images in the training set, sums behind the averages; the best
                  value of the figure that --best_by names, and its epoch; test_* of the last evaluation; how often the
                  run went back to an earlier checkpoint
    stats         train_* and test_* of log.txt's line of the last epoch completed
    rng           the states of every rank's random streams
    job, saved    "pretrain", "finetune" or "linprobe"; the time in seconds since 1970, for information
"""

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import nn

from util.amp import LossScaler
from util.checkpoint.comparison import comparable, compare_flags
from util.checkpoint.files import (
    checkpoint_args,
    digest_file,
    effective_batch,
    find_damage,
    is_url,
    load_checkpoint,
    write_checkpoint,
)
from util.checkpoint.formats import describe
from util.checkpoint.weights import load_model
from util.disk import remove_unfinished
from util.distributed import dist
from util.errors import UserError
from util.optim import scaled_lr
from util.report.boards import WANDB_ID, events_suffix
from util.rng import get_rng_state

EVENTS = "events.out.tfevents.*"  # TensorBoard's files
# Flags that, with the learning rate and the effective batch, decide where a step lies in the schedule.
SCHEDULE = ("epochs", "warmup_epochs", "min_lr")
# Flags on which the best figure so far depends, with their values in checkpoints that lack them.
BEST_OF = {"best_by": "acc1", "val_fraction": 0.0, "val_seed": 0}
# Flags whose change is not worth a line when a run is resumed: they do not decide which updates are computed.
NEUTRAL_FLAGS = {
    *("resume", "resume_override", "overwrite", "start_epoch", "eval", "init"),  # how the run starts
    *("output_dir", "log_dir", "wandb", "save_freq", "keep", "save_minutes", "monitor_freq"),  # its files
    *("num_workers", "pin_mem", "device", "max_megapixels"),
    *("eval_freq", "confusion", "max_bad_steps", "max_bad_images"),  # what is measured, and tolerated
    *("world_size", "local_rank", "dist_on_itp", "dist_url", "dist_eval", "dist_timeout", "shard"),
    *("compile", "attention", "grad_checkpoint"),  # speed and memory
}


@dataclass
class Position:
    """The point that a run has reached.

    Attributes:
        epoch: The epoch under way, from 0.
        images: Images of this epoch that are used already, over all ranks.
        dataset: Images in the training set; 0: unknown.
        totals: Sums and counts of this epoch's averages so far, by name.
        best: Best value so far of the figure that --best_by names, in per cent; -1: none.
        best_epoch: The epoch of the best value; -1: none.
        tested: test_* of the last evaluation, by whichever epoch.
        branch: Number that grows each time the run goes back to an earlier checkpoint; --resume auto takes a checkpoint
            of the highest branch first.
        rng: States of the random streams by rank, as a checkpoint held them; empty in a new run.
        stats: train_* and test_* of log.txt's line of the last epoch completed.
    """

    epoch: int = 0
    images: int = 0
    dataset: int = 0
    totals: dict[str, list[float]] = field(default_factory=dict)
    best: float = -1.0
    best_epoch: int = -1
    tested: dict[str, float] = field(default_factory=dict)
    branch: int = 0
    rng: list[dict] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)

    def restart_epoch(self) -> None:
        """Go to the beginning of the epoch, with nothing of it done."""
        self.images, self.totals = 0, {}


class Checkpoints:
    """The checkpoints of one run in output_dir: saved, pruned, and resumed from. Without output_dir nothing is written.

    All ranks call its methods, and rank 0 writes; `prepare` is for rank 0 alone.
    """

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
        """Collect the objects whose state is saved and restored.

        Args:
            output_dir: Folder of the run; "": write nothing.
            job: "pretrain", "finetune" or "linprobe".
            model: The model, without DDP.
            optimizer: Optimiser of the model's parameters.
            scaler: Loss scaler of the precision.
            args: The run's flags; args["model"] is the model's name, and args["keep"] the number of epoch checkpoints
                that stay (None: all).
            class_to_idx: The classes of a classifier.
            ema: EMA of the model's weights, if one is kept.
        """
        self.folder = Path(output_dir) if output_dir else None
        self.job, self.model, self.optimizer, self.scaler = job, model, optimizer, scaler
        self.args = {**args, "world_size": dist.world_size()}
        self.class_to_idx, self.ema = class_to_idx, ema
        self.newest = ""  # path of the newest checkpoint, for messages

    @property
    def images_per_step(self) -> int:
        """Return the number of images in a batch of all ranks."""
        return self.args["batch_size"] * dist.world_size()

    @property
    def goes_back(self) -> bool:
        """Return whether the run resumes from a checkpoint of its own folder that may not be the newest there."""
        source = self.args.get("resume", "")
        if self.folder is None or source == "auto":
            return False
        return is_inside(source, self.folder) and Path(source).name != "checkpoint-last.pth"

    def next_branch(self) -> int:
        """Return the number of a branch later than those of all checkpoints in the folder; all ranks must call."""
        heads = dist.run_on_rank0(lambda: [_progress(head) for _, head in _peek(self.folder) if isinstance(head, dict)])
        return 1 + max((branch for branch, *_ in heads), default=0)

    def prepare(self, source: str) -> None:
        """Make the folder ready for a run that resumes from a source, or starts from scratch (source "").

        Checkpoints that a killed process left unfinished are removed, and other unfinished files that are older than an
        hour. If the run does not resume from this folder, the checkpoints, logs and reconstructions of the run before
        it are removed with --overwrite, from --log_dir too; without it, the old log.txt is renamed. The run then is a
        new one at Weights & Biases, too.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unwanted, log = ["checkpoint-*.tmp"], self.folder / "log.txt"
        if not is_inside(source, self.folder):
            unwanted.append(WANDB_ID)
            if self.args.get("overwrite"):
                unwanted += ["checkpoint-*.pth", "log.txt", EVENTS, "reconstructions/epoch-*.png"]
                if log_dir := self.args.get("log_dir"):
                    for file in Path(log_dir).glob(EVENTS + events_suffix(str(self.folder), log_dir)):
                        file.unlink()
            elif log.exists():
                earlier = log.rename(self.folder / f"log-{int(log.stat().st_mtime)}.txt")
                dist.print_rank0(f"notice: the log of the run before is {earlier} now")
        for pattern in unwanted:
            for file in self.folder.glob(pattern):
                file.unlink()
        remove_unfinished(self.folder, idle=3600)  # main_predict.py, for one, may be writing there now

        # Earlier versions wrote a digest beside every checkpoint: remove those whose checkpoint is gone.
        for digest in self.folder.glob("checkpoint-*.pth.sha256"):
            if not digest.with_suffix("").exists():
                digest.unlink()

    def save(self, position: Position, whole_epoch: bool, rng: dict | None = None) -> None:
        """Write checkpoint-last.pth, then remove the checkpoints that --keep does not retain.

        Args:
            position: The point that the run has reached.
            whole_epoch: Whether position.epoch is completed; then checkpoint-{epoch}.pth is written too.
            rng: This rank's random streams at the position; None: as they are now.

        Raises:
            UserError: It cannot be written; on all ranks.
        """
        rng = dist.all_gather(get_rng_state() if rng is None else rng)
        if self.folder is None:
            return
        dist.gather_optimizer(self.optimizer)
        names = ["last"]
        if whole_epoch:
            names = [str(position.epoch), "last"]
            position = replace(position, epoch=position.epoch + 1, images=0, totals={})
        paths = [self._file(name) for name in names]

        def write_and_prune() -> None:
            write_checkpoint(self._state(position, rng), paths)
            self._prune(position)

        dist.run_on_rank0(write_and_prune)
        self.newest = str(paths[0])

    def epoch_file(self, epoch: int) -> Path | None:
        """Return the checkpoint of an epoch; None if the folder has none, as after resuming from another folder."""
        file = self._file(str(epoch)) if self.folder else None
        return file if file and file.exists() else None

    def _file(self, name: str) -> Path:
        return self.folder / f"checkpoint-{name}.pth"

    def _state(self, position: Position, rng: list[dict]) -> dict:
        """Return the contents of a checkpoint, as the module's docstring lists them."""
        stored_elsewhere = ("epoch", "rng", "stats")
        state = {
            "model": self.model.state_dict(),
            "model_config": {"model": self.args["model"], **self.model.config},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "amp": self.scaler.amp,
            "epoch": position.epoch - 1,
            "args": self.args,
            "position": {name: value for name, value in asdict(position).items() if name not in stored_elsewhere},
            "stats": position.stats,
            "rng": rng,
            "job": self.job,
            "saved": time.time(),
        }
        if self.class_to_idx is not None:
            state["class_to_idx"] = self.class_to_idx
        if self.ema is not None:
            state["model_ema"] = self.ema.state_dict()
        return state

    def _prune(self, position: Position) -> None:
        """Remove the epoch checkpoints before the position but the newest args["keep"] (None: all) and the best one."""
        if self.args.get("keep") is None:
            return
        matches = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in self.folder.iterdir())
        numbered = {int(match[1]): path for match, path in matches if match}
        # A run that resumed from an older checkpoint leaves later ones behind: they are not newer than its own.
        passed = sorted(epoch for epoch in numbered if epoch < position.epoch)
        for epoch in passed[: -self.args["keep"]]:
            if epoch != position.best_epoch:
                numbered[epoch].unlink()
                digest_file(numbered[epoch]).unlink(missing_ok=True)

    def resume(self, source: str, start_epoch: int = 0, override: bool = False, dataset: int = 0) -> Position:
        """Load model, EMA, optimiser and scaler from a checkpoint, and return the position to resume at.

        Args:
            source: File or address of the checkpoint; "": none.
            start_epoch: Epoch to start at without a source, and from a file that holds weights alone.
            override: Accept a schedule that differs from the checkpoint's.
            dataset: Images in the training set; 0: unknown. Another number means another order, so that an epoch under
                way starts again.

        Raises:
            UserError: The checkpoint can't be read, or does not fit the job, the model, the optimiser, the classes or,
                without override, the schedule.
        """
        if not source:
            return Position(start_epoch, dataset=dataset)

        # The weights. An EMA that the file lacks begins at the weights that the run begins with.
        checkpoint = load_checkpoint(source)
        load_model(source, checkpoint, self.model, self.args, self.class_to_idx)
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.get("model_ema") or self.model.state_dict())
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            compare_flags(source, checkpoint, self.args, ("mean", "std", "exif", "norm_pix_loss"))
            dist.print_rank0(
                f"weights from {source} ({describe(checkpoint)}), which holds no optimiser: "
                f"starting at epoch {start_epoch}"
            )
            return Position(start_epoch, dataset=dataset)

        # The schedule is compared before the state of the optimiser is touched.
        batch_changed = self._compare(source, checkpoint_args(checkpoint), override)
        self._load_optimizer(source, checkpoint["optimizer"])
        self._keep_precision(checkpoint)
        self.scaler.load_state_dict(checkpoint.get("scaler") or {})
        self.newest = source

        position = self._read_position(checkpoint, batch_changed, dataset)
        progress = f"after epoch {checkpoint['epoch']}"
        if position.images:
            progress = f"epoch {position.epoch}, {position.images:,} images done"
        dist.print_rank0(f"resuming from {source} ({progress})")
        return position

    def _load_optimizer(self, source: str, state: dict) -> None:
        """Load the optimiser's state, but keep the hyperparameters that today's flags set; the schedule sets lr."""
        try:
            for stored, current in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
                stored |= {name: value for name, value in current.items() if name not in ("params", "lr")}
            dist.load_optimizer(self.optimizer, state)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the optimiser state in {source} belongs to another job or model: {error}. Pass the flags that the "
                "checkpoint was made with"
            ) from error

    def _read_position(self, checkpoint: dict, batch_changed: bool, dataset: int) -> Position:
        """Return the position in a checkpoint; an epoch whose order of images has changed starts again.

        Args:
            checkpoint: The contents of the file.
            batch_changed: Whether the effective batch is not the checkpoint's.
            dataset: Images in the training set; 0: unknown.
        """
        known = {field.name for field in fields(Position)}  # a later version may store more
        position = Position(
            checkpoint["epoch"] + 1,
            **{name: value for name, value in checkpoint.get("position", {}).items() if name in known},
            rng=checkpoint.get("rng", []),
            stats=checkpoint.get("stats", {}),
        )

        # The stored sums count batches of the checkpoint's size: convert them to batches of the present size.
        if position.totals:
            weight = checkpoint_args(checkpoint)["batch_size"] / self.args["batch_size"]
            position.totals = {name: [value * weight for value in pair] for name, pair in position.totals.items()}

        # A best value of another figure, or on other validation images, can't be compared with the coming ones.
        stored = checkpoint_args(checkpoint)
        if any(stored.get(name, value) != self.args.get(name, value) for name, value in BEST_OF.items()):
            position.best, position.best_epoch = -1.0, -1

        # The position in an epoch is a number of images, which has no meaning if they now come in another order or in
        # other batches: start the epoch again.
        change = ""
        if batch_changed:
            change = "batch size changed"
        elif dataset and position.dataset not in (0, dataset):
            change = f"number of training images changed from {position.dataset} to {dataset}"
        if change and position.images:
            dist.print_rank0(f"{change}: epoch {position.epoch} starts again")
            position.restart_epoch()
        position.dataset = dataset
        return position

    def _keep_precision(self, checkpoint: dict) -> None:
        """Use the checkpoint's precision if today's --amp is auto and the kind of device is the same."""
        stored, current = checkpoint_args(checkpoint).get("device"), self.args.get("device")
        same_device = stored and current and torch.device(stored).type == torch.device(current).type
        if self.args.get("amp") == "auto" and "amp" in checkpoint and same_device:
            self.scaler.use(checkpoint["amp"])

    def _compare(self, source: str, stored_args: dict, override: bool) -> bool:
        """Print the flags that differ from the checkpoint's; without override refuse those that change the schedule.

        Args:
            source: The checkpoint, for the messages.
            stored_args: The flags that it was made with.
            override: Accept another schedule.

        Returns:
            Whether the effective batch differs; True where the checkpoint holds no flags.

        Raises:
            UserError: The schedule differs, without override.
        """
        if not stored_args:
            return True
        differing = [
            f"--{name} {stored_args[name]} -> {value}"
            for name, value in self.args.items()
            if name not in NEUTRAL_FLAGS and name in stored_args and comparable(stored_args[name]) != comparable(value)
        ]
        before, now = _schedule(stored_args), _schedule(self.args)
        changes = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changes and not override:
            raise UserError(
                f"the schedule differs from that of {source}: {', '.join(changes)}. Pass the flags that it was made "
                f"with{_same_batch(stored_args, self.args)}, or --resume_override to resume with the new ones"
            )
        if differing:
            dist.print_rank0(f"flags that differ from the checkpoint's: {', '.join(differing)}")
        return before.get("effective batch") != now.get("effective batch")


def _same_batch(stored: dict, args: dict) -> str:
    """Return a phrase with the batch size that makes up for another number of processes than a checkpoint's, or ""."""
    batch = effective_batch(stored)
    if batch is None or effective_batch(args) in (None, batch) or stored["world_size"] == args["world_size"]:
        return ""
    ranks = args["world_size"]
    per_rank, rest = divmod(batch, ranks * args["accum_iter"])
    if rest:
        return ""
    return f" (it had {stored['world_size']} processes, here are {ranks}: --batch_size {per_rank})"


def _schedule(args: dict) -> dict[str, object]:
    """Return the values that decide where a step lies in the schedule and in the order of the images."""
    values = {f"--{name}": args[name] for name in (*SCHEDULE, "seed") if name in args}
    batch = effective_batch(args)
    if batch is None:
        return values
    values["effective batch"] = batch
    if "blr" in args:
        # Absolute rates: the same --blr means another rate with another batch. A sweep has a list of them.
        base_rates = args["blr"] if isinstance(args["blr"], list) else [args["blr"]]
        rates = [scaled_lr(blr, batch) for blr in base_rates] if args.get("lr") is None else [args["lr"]]
        values["learning rate"] = ", ".join(f"{rate:.9g}" for rate in rates)
    return values


def is_inside(source: str, folder: str | Path) -> bool:
    """Return whether a path lies directly in a folder, as given or with links resolved; False for "" and addresses."""
    if not source or is_url(source):
        return False
    return Path(folder).resolve() in (Path(source).parent.resolve(), Path(source).resolve().parent)


def resolve_resume(source: str, output_dir: str, job: str, model: str) -> str:
    """Return the checkpoint that --resume stands for; all ranks must call.

    Args:
        source: The flag's value: a file, an address, "" or "auto".
        output_dir: Folder in which "auto" looks.
        job: The run's job.
        model: The name of its model.

    Returns:
        The value itself, or for "auto" the newest valid checkpoint of this job and model, "" where the folder holds no
        checkpoint. The choice, and the reason for each file that was skipped, are printed.

    Raises:
        UserError: Every checkpoint in the folder is damaged or belongs to another run.
    """
    if source != "auto":
        return source
    return dist.run_on_rank0(lambda: _newest_valid(Path(output_dir), job, model))


def _peek(folder: Path) -> Iterator[tuple[Path, dict | UserError]]:
    """Yield each checkpoint in a folder with its contents, whose tensors stay on the disk, or with its error."""
    for path in folder.glob("checkpoint-*.pth"):
        try:
            yield path, load_checkpoint(str(path), peek=True)
        except UserError as error:
            yield path, error


def _progress(checkpoint: dict) -> tuple[int, int, int]:
    """Return how far a run had come: branch, epoch, images; not when, since clocks of machines differ."""
    position = checkpoint.get("position")
    position = position if isinstance(position, dict) else {}
    values = position.get("branch", 0), checkpoint.get("epoch", -1), position.get("images", 0)
    return tuple(value if isinstance(value, int) else -1 for value in values)


def _newest_valid(folder: Path, job: str, model: str) -> str:
    """Return the newest undamaged checkpoint of this job and model in a folder; "" if it holds no checkpoint.

    Raises:
        UserError: It holds some, and none can be used.
    """
    # Look at every file without reading its tensors: does it open, and does it belong to this run?
    candidates, skipped = [], []
    for path, head in _peek(folder):
        if isinstance(head, UserError):
            skipped.append(str(head))
            continue
        stored_job, stored_model = head.get("job", job), head.get("model_config", {}).get("model", model)
        if (stored_job, stored_model) != (job, model):
            skipped.append(f"{path} belongs to another run, of job {stored_job} and model {stored_model}")
            continue
        # Of two with the same progress, which were written together, checkpoint-last.pth is preferred.
        candidates.append((*_progress(head), path.name == "checkpoint-last.pth", path))

    # Read them whole from the newest on, until one is undamaged.
    for *_, path in sorted(candidates, reverse=True):
        if problem := find_damage(path):
            skipped.append(problem)
            continue
        for reason in skipped:
            dist.print_rank0(f"warning: skipped: {reason}")
        dist.print_rank0(f"--resume auto: {path} is the newest valid checkpoint")
        return str(path)

    # An empty folder is a fresh start. One whose checkpoints are all unusable is left to the user to decide about.
    if skipped:
        raise UserError(
            f"--resume auto: no checkpoint in {folder} can be used:\n  "
            + "\n  ".join(skipped)
            + "\n  Choose another --output_dir, or leave out --resume and pass --overwrite to remove them and start "
            "from scratch"
        )
    dist.print_rank0(f"--resume auto: no checkpoint in {folder} yet; a new run starts")
    return ""

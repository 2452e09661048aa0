"""Checks of the jobs' flags before any data is read.

The functions return problems as messages, so that all are reported at once.
"""

import argparse
import math
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch

from util import disk, lock, masking, options, resources
from util.checkpoint.configurations import weights_in
from util.checkpoint.files import is_url
from util.data.splits import SPLITS
from util.data.transforms import FinetuneTransform
from util.distributed import dist, launchers
from util.errors import UserError, raise_problems
from util.misc import is_inside

# Ranges of numbers: (test, message).
AT_LEAST_1 = (lambda x: x >= 1, "must be at least 1")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "must be at least 0 and finite")
POSITIVE = (lambda x: 0 < x < math.inf, "must be greater than 0 and finite")
MINUTES = (lambda x: 0 < x <= 10**6, "must be greater than 0, and at most 1000000")
SHARE = (lambda x: 0 <= x <= 1, "must lie between 0 and 1")
POSITIVE_SHARE = (lambda x: 0 < x <= 1, "must be greater than 0, and at most 1")
MASK_RATIO = (lambda x: 0 < x < 1, "must lie between 0 and 1, and keep and remove at least one patch")
CROP_SHARE = (lambda x: 0.01 <= x <= 1, "must be at least 0.01, and at most 1")
BELOW_1 = (lambda x: 0 <= x < 1, "must be at least 0 and less than 1")
SEED = (lambda x: 0 <= x < 2**31, "must be at least 0 and less than 2147483648")

# The flags of each range. Those that a job or a script lacks, and those left at None, are not checked.
FLAGS_BY_RANGE = [
    (AT_LEAST_1, "batch_size accum_iter epochs save_freq eval_freq keep max_bad_steps nb_classes"),
    (AT_LEAST_1, "input_size patch_size in_chans decoder_dim decoder_depth decoder_heads recount"),
    (NOT_NEGATIVE, "warmup_epochs num_workers start_epoch weight_decay min_lr save_minutes monitor_freq"),
    (NOT_NEGATIVE, "mixup cutmix color_jitter lr blr"),
    (POSITIVE, "clip_grad layer_decay max_megapixels"),
    (MINUTES, "dist_timeout"),
    (POSITIVE_SHARE, "train_fraction"),
    (CROP_SHARE, "crop_pct"),
    (SEED, "seed val_seed"),
    (SHARE, "max_bad_images reprob mixup_prob mixup_switch_prob"),
    (BELOW_1, "drop_path smoothing model_ema_decay val_fraction"),
    (MASK_RATIO, "mask_ratio"),
]

# Flags that may differ between the ranks, whose machines may differ.
OWN_FLAGS = {"num_workers", "pin_mem", "device", "world_size", "local_rank"}


def check(args: argparse.Namespace, models: dict) -> None:
    """Check all arguments before any data is read, and set torchrun's environment variables from the launcher's.

    Raises:
        UserError: There are problems; all of them are named at once.
    """
    raise_problems(launchers.rank_problems())  # all else goes by these numbers
    problems = launchers.set_torchrun_env(args.dist_on_itp, args.dist_url)
    raise_problems(problems + flag_problems(args, models) + _environment_problems(args))
    for notice in launchers.notices():
        dist.print_rank0(f"notice: {notice}")


def check_together(args: argparse.Namespace) -> None:
    """Check what concerns all ranks: equal flags, and an output_dir, which is reserved for this run until it ends.

    A rank that does not see the others' output_dir causes a warning. With --eval there is no output_dir.

    Raises:
        UserError: The ranks were started with different flags, or another run uses the folder; on all ranks.
    """
    _refuse_different_flags(args)
    if not args.output_dir or getattr(args, "eval", False):
        return
    folder = args.output_dir
    holder, mark = dist.run_on_rank0(lambda: (lock.lock_folder(folder), lock.lock_mark(folder)))
    if holder:
        raise UserError(
            f"--output_dir {folder} is in use by another run, {holder}; wait for it to end, or choose another folder"
        )

    # A folder that only some machines see is an error at the latest when the run is resumed.
    patience = min(60.0, args.dist_timeout * 60 / 2)  # seconds; the others wait for the answer
    sees = dist.all_gather(dist.rank() == 0 or lock.sees_mark(folder, mark, patience))
    blind = [rank for rank, sees_it in enumerate(sees) if not sees_it]
    if blind:
        dist.print_rank0(
            f"warning: --output_dir {folder} of rank {blind[0]} is another folder than rank 0's. It must "
            "be one that all machines share: without that, the run can't be resumed"
        )


def _refuse_different_flags(args: argparse.Namespace) -> None:
    """Check that all ranks were started with the same flags, apart from those of OWN_FLAGS.

    Raises:
        UserError: They were not; on all ranks.
    """
    flags = {name: str(value) for name, value in vars(args).items() if name not in OWN_FLAGS}
    first, *others = dist.all_gather(flags)
    for rank, other in enumerate(others, 1):
        names = [name for name in first if first[name] != other.get(name)]
        if names:
            theirs, ours = (" ".join(f"--{name} {ranks.get(name)}" for name in names) for ranks in (other, first))
            raise UserError(
                f"rank {rank} was started with {theirs}, rank 0 with {ours}: start all processes with the same flags"
            )


def flag_problems(args: argparse.Namespace, models: dict) -> list[str]:
    """Return the problems that the flags have by themselves, on whichever machine they are to run."""
    problems = range_problems(args)
    problems += _model_problems(args, models) + _training_problems(args)
    if not args.data_path:
        problems.append(
            "--data_path is missing: the folder that holds train/<class>/ and val/<class>/, or train.tar and val.tar"
        )
    return problems


def range_problems(args: argparse.Namespace) -> list[str]:
    """Return the problems of flags, of a job or of a script, whose values lie out of the ranges of FLAGS_BY_RANGE."""
    return [
        f"--{name} {value} {message}"
        for (in_range, message), names in FLAGS_BY_RANGE
        for name in names.split()
        for value in _values(getattr(args, name, None))
        if not in_range(value)
    ]


def _values(value: object) -> list | tuple:
    """Return a flag's values as a sequence, whether it holds none, one or several."""
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


def _model_problems(args: argparse.Namespace, models: dict) -> list[str]:
    if args.model not in models:
        return [f"--model {args.model} is unknown: choose one of {', '.join(models)}"]

    # Sizes. Without valid ones there is no number of patches, on which the mask ratio depends.
    patch = args.patch_size or models[args.model].keywords["patch_size"]
    sides = _values(args.input_size)
    if len(sides) > 2:
        return [f"--input_size {' '.join(map(str, sides))}: give one size, or height and width"]
    if min(sides) < 1 or patch < 1:
        return []  # reported as out of range
    if any(side % patch for side in sides):
        return [f"--input_size {' '.join(map(str, sides))} is not a multiple of the patch size, {patch}"]

    # Channels, decoder, masks.
    problems = _pixel_problems(args)
    if hasattr(args, "decoder_dim"):
        problems += _decoder_problems(args, models)
    patches = math.prod(side // patch for side in (sides * 2)[:2])
    ratio = getattr(args, "mask_ratio", None)
    if ratio is not None and 0 < ratio < 1:
        problems += masking.ratio_problems(ratio, patches)
    if getattr(args, "norm_pix_loss", False) and patch**2 * args.in_chans == 1:
        problems.append("--norm_pix_loss: a patch of one value has no variance; omit it, or take a larger --patch_size")
    return problems


def _pixel_problems(args: argparse.Namespace) -> list[str]:
    C = args.in_chans
    if args.mean is None or args.std is None:
        return [f"--in_chans {C} needs --mean and --std, {C} numbers each: scripts/mean_std.py computes them"]
    problems = [
        f"--{name} needs {C} numbers, one for each of --in_chans {C}"
        for name in ("mean", "std")
        if len(getattr(args, name)) != C
    ]
    tiny = torch.finfo(torch.float32).tiny
    if not all(tiny <= value < math.inf for value in args.std):
        values = " ".join(map(str, args.std))
        problems.append(f"--std {values}: must be greater than 0 and finite; a channel that never changes has 1")
    if not all(map(math.isfinite, args.mean)):
        problems.append(f"--mean {' '.join(map(str, args.mean))}: must be finite")
    return problems


def _decoder_problems(args: argparse.Namespace, models: dict) -> list[str]:
    defaults = models[args.model].keywords
    width = args.decoder_dim or defaults["decoder_embed_dim"]
    heads = args.decoder_heads or defaults["decoder_num_heads"]
    # By 4 for the position embedding: sine and cosine of both coordinates.
    if width > 0 and heads > 0 and (width % heads or width % 4):
        return [f"--decoder_dim {width} must be a multiple of 4 and of --decoder_heads {heads}"]
    return []


def _training_problems(args: argparse.Namespace) -> list[str]:
    # Flags of all jobs.
    problems = []
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        problems.append(f"--crop_scale {low} {high}: needs 0 < MIN <= MAX <= 1")
    if not getattr(args, "eval", False):
        problems += [
            f"--{name} {getattr(args, name)} must be less than --epochs {args.epochs}: pass a smaller one, such as "
            f"--{name} {max(0, smaller)}"
            for name, smaller in (("warmup_epochs", args.epochs // 10), ("start_epoch", args.epochs - 1))
            if getattr(args, name) >= args.epochs
        ]

    # Flags of single jobs.
    if hasattr(args, "mixup"):
        problems += _augmentation_problems(args)
    if isinstance(args.blr, list):
        problems += _sweep_problems(args)
    blocks = getattr(args, "trainable_blocks", None)
    if blocks is not None and (blocks < 0 or blocks % 0.5):
        problems.append(f"--trainable_blocks {blocks:g} must be a multiple of 0.5, not negative")
    if hasattr(args, "probe") and args.batch_size == 1 and not args.eval:
        problems.append("--batch_size 1: the probe's BatchNorm needs at least 2 images: raise it")
    if getattr(args, "eval", False) and not args.resume:
        problems.append("--eval needs --resume FILE, the checkpoint to evaluate")
    return problems


def _augmentation_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if options.mixes(args) and args.batch_size % 2:
        problems.append(f"--batch_size {args.batch_size} must be even for mixup and cutmix")
    bounds, sides = args.cutmix_minmax, _values(args.input_size)
    if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= 1):
        problems.append(f"--cutmix_minmax {' '.join(map(str, bounds))}: needs two numbers, 0 <= MIN < MAX <= 1")
    elif bounds is not None and any(int(side * bounds[0]) == int(side * bounds[1]) for side in sides):
        problems.append(f"--cutmix_minmax {bounds[0]} {bounds[1]}: no length in pixels is in between; widen the range")
    try:
        FinetuneTransform(32, (0.5, 1.0), None, args.aa, 0.0, "pixel", 1)
    except Exception:  # timm asserts, and parses with float()
        problems.append(
            f"--aa {args.aa} is not a policy of timm: give for example rand-m9-mstd0.5-inc1, augmix-m3, or none"
        )
    return problems


def _sweep_problems(args: argparse.Namespace) -> list[str]:
    """Return a message for each flag that doesn't go with several --blr, each of which trains a head of its own."""
    problems = []
    if args.lr is not None:
        problems.append("--lr gives one learning rate, --blr several: omit one of them")
    if args.clip_grad is not None:
        problems.append("--clip_grad would make the heads of several --blr depend on each other: omit it")
    if args.min_lr:
        problems.append("--min_lr would differ between the heads of several --blr, which scale it: omit it")
    if 0 in args.blr:
        problems.append("--blr 0 among several trains nothing: omit it")
    if getattr(args, "probe", "") == "attentive":
        problems.append("--probe attentive takes one --blr: the heads of a sweep would share its query")
    return problems


def device_problems(name: str) -> list[str]:
    """Check --device on this machine; return a list with one message, or an empty one."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"--device {name} is unknown: choose cuda, mps or cpu"]
    if device.type == "cuda":
        return _cuda_problems(name, device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        return [f"--device {name} is not available on this machine: omit the flag to use the device that is"]
    return [] if device.type in ("mps", "cpu") else [f"--device {name}: choose cuda, mps or cpu"]


def _cuda_problems(name: str, device: torch.device) -> list[str]:
    if not torch.cuda.is_available():
        return [f"--device {name}: this machine has no CUDA GPU; omit the flag to use the device that it has"]
    gpus = torch.cuda.device_count()
    processes = launchers.gpus_needed(gpus)
    if device.index is None:
        if processes <= gpus:
            return []
        return [
            f"--device {name}: the processes of this machine need {processes} GPU(s), one each, and it has {gpus}; "
            "start fewer processes"
        ]
    if processes > 1:
        return [f"--device {name}: the {processes} processes of this machine take a GPU each; use --device cuda"]
    if device.index >= gpus:
        return [f"--device {name}: this machine has {gpus} GPU(s), numbered from 0; choose another number"]
    return []


def open_file_problems(args: argparse.Namespace) -> list[str]:
    """Raise the limit of open files where it is too low for the run; return a message if it can't be raised enough."""
    workers = min(args.num_workers, resources.cores())
    tensors = 4 if hasattr(args, "reprob") else 2  # erased boxes travel beside images and classes
    needed = resources.open_files_needed(workers, tensors)
    allowed = resources.allow_open_files(needed)
    if allowed >= needed:
        return []
    remedy = "raise the limit, or lower --num_workers" if workers else "raise the limit"
    return [
        f"'ulimit -n' allows {allowed} open files, and this run needs about {needed} with --num_workers {workers}: "
        f"{remedy}"
    ]


def _is_there(source: str) -> bool:
    """Return whether a checkpoint is an address, a file, or a folder that holds weights."""
    return is_url(source) or Path(source).is_file() or bool(weights_in(Path(source)))


def replaced_input_problems(name: str, output: str | Path, inputs: Iterable[str | Path]) -> list[str]:
    """Check that an output replaces no input, checkpoint or log; return a list with one message, or an empty one.

    Args:
        name: The output's flag, without --.
        output: The file or folder to write.
        inputs: Files, folders and addresses that are read; "" for none.
    """
    path = Path(output).resolve()
    if path in {Path(source).resolve() for source in inputs if source}:
        return [f"--{name} {output} is one of the inputs, and would be replaced: choose another name"]
    if path.is_file() and (path.suffix in (".pth", ".pt", ".safetensors") or path.name == "log.txt"):
        return [f"--{name} {output} is a checkpoint or a log, and would be replaced: choose another name"]
    return []


def _environment_problems(args: argparse.Namespace) -> list[str]:
    """Return the problems that the flags have on this machine: device, files, folders."""
    # Device, open files, and input files.
    problems = device_problems(args.device) + open_file_problems(args)
    if args.data_path and not Path(args.data_path).is_dir():
        problems.append(
            f"--data_path {args.data_path}: no such folder; it must hold train/<class>/<images>, or train.tar"
        )
    # A run that resumes does not read the file that it once began with.
    resumes = any(Path(args.output_dir).glob("checkpoint-*.pth")) if args.resume == "auto" else bool(args.resume)
    for name in ("resume",) if resumes else ("resume", "finetune", "init"):
        source = getattr(args, name, "")
        if source and (name, source) != ("resume", "auto") and not _is_there(source):
            problems.append(f"--{name} {source}: no such file, nor a folder with model.safetensors")

    # Names of classes.
    try:
        options.given_class_names(args)
    except UserError as error:
        problems.append(str(error))

    # Output. Evaluation writes into no folder of a run.
    if table := getattr(args, "confusion", ""):
        if reason := disk.unwritable_file(Path(table)):
            problems.append(f"--confusion {table} can't be written to: {reason}")
        inputs = [getattr(args, name, "") for name in ("resume", "finetune", "class_names")]
        problems += replaced_input_problems("confusion", table, inputs)
        if args.data_path and Path(table).resolve().is_relative_to(Path(args.data_path).resolve()):
            problems.append(f"--confusion {table} lies among the images of --data_path: choose another folder")
    problems += _wandb_problems(args.wandb)
    if args.resume == "auto" and not args.output_dir:
        problems.append("--resume auto looks for checkpoints in --output_dir, which is '': name the run's folder")
    return problems if getattr(args, "eval", False) else problems + _output_problems(args)


def _wandb_problems(project: str) -> list[str]:
    """Check that the package that --wandb needs is there; return a list with one message, or an empty one."""
    if project:
        try:
            from wandb import init  # noqa: F401 (a folder "wandb", which wandb itself makes, would pass as a package)
        except ImportError:
            return ["--wandb needs the package wandb: pip install wandb"]
    return []


def _output_problems(args: argparse.Namespace) -> list[str]:
    # Can the folders be written to? If log_dir is output_dir, report it once.
    problems = []
    for name in ("output_dir", "log_dir"):
        path = getattr(args, name)
        if path and (reason := disk.unwritable(path)) and (name == "output_dir" or path != args.output_dir):
            problems.append(f"--{name} {path} can't be written to: {reason}")

    # Would it lie among the images, as a class?
    for split in SPLITS if args.data_path and args.output_dir else ():
        if Path(args.output_dir).resolve().is_relative_to((Path(args.data_path) / split).resolve()):
            problems.append(f"--output_dir {args.output_dir} lies among the images: choose a folder elsewhere")

    # Would --overwrite remove the checkpoint from which to start?
    for name in ("finetune", "init"):
        source = Path(getattr(args, name, ""))
        is_checkpoint = fnmatch(source.resolve().name, "checkpoint-*.pth")
        if args.overwrite and is_checkpoint and is_inside(str(source), args.output_dir):
            problems.append(f"--overwrite would remove --{name} {source} itself: choose another --output_dir")

    # Would it remove the run's own checkpoints at a restart?
    if args.overwrite and args.resume != "auto" and launchers.restarts():
        problems.append(
            "--overwrite would remove this run's own checkpoints whenever torchrun (--max-restarts) or SLURM "
            "(--requeue) starts it again: choose another --output_dir, and pass --resume auto"
        )

    # Does output_dir hold a run that a fresh start would spoil?
    if not args.output_dir or args.overwrite or args.resume == "auto" or is_inside(args.resume, args.output_dir):
        return problems
    patterns = "log.txt", "checkpoint-*.pth"
    files = sorted(path.name for pattern in patterns for path in Path(args.output_dir).glob(pattern))
    if files:
        resume = "--resume auto resumes it, " if files != ["log.txt"] else ""
        problems.append(
            f"--output_dir {args.output_dir} holds another run ({files[0]}): {resume}--overwrite removes it, or choose "
            "another folder"
        )
    return problems

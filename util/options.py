"""The flags that the jobs share, and their validation. Names, meanings and defaults are the reference's."""

import argparse
import math
from fnmatch import fnmatch
from pathlib import Path

import torch

from util import speed
from util.checkpoint import output_dir
from util.checkpoint.files import is_url
from util.checkpoint.formats import weights_in
from util.data.images import Pixels
from util.data.loaders import Loading
from util.data.transforms import FinetuneTransform
from util.distributed import dist, launchers
from util.errors import UserError
from util.loop import RunSettings
from util.misc import is_inside


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default behind every flag that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False or action.default == ""
        return action.help if bare else super()._get_help_string(action)


def common_parser(
    description: str, models: dict, several_rates: bool = False, **defaults: object
) -> argparse.ArgumentParser:
    """The flags of every job; defaults: the job's own, by the flags' names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help=f"one of {', '.join(models)}")
    add("--input_size", default=224, type=int, nargs="+", metavar="SIDE", help="pixels; or height and width")
    add("--patch_size", type=int, help="default: the model's")
    add("--in_chans", default=3, type=int, metavar="C", help="channels of the images")

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=int, help="per process")
    add("--accum_iter", default=1, type=int, help="batches accumulated per update")
    add("--epochs", type=int, help="length of the whole schedule")
    add("--warmup_epochs", type=int, help="of linear warm-up")
    add("--lr", type=float, help="learning rate; default: blr * effective batch size / 256")
    several = {"nargs": "+", "metavar": "BLR"} if several_rates else {}
    by_probe = "; default: 0.1, attentive 1e-3" if several_rates else ""
    add("--blr", type=float, help=f"base learning rate, per 256 images{by_probe}", **several)
    add("--min_lr", type=float, help="learning rate at the end")
    add("--weight_decay", type=float, help="1-D parameters don't decay")
    add("--clip_grad", type=float, help="largest gradient norm; default: no clipping")
    add("--max_bad_steps", default=5, type=int, help="skipped updates (gradients not finite) in a row that stop a run")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision; auto: bf16 where it is fast")

    add = parser.add_argument_group("speed").add_argument
    add("--attention", default="auto", choices=speed.ATTENTION, help="auto: fused, but plain for bf16 on a CPU")
    add("--compile", action="store_true", default=None, help="compile the blocks (a minute at first); default: on CUDA")
    add("--no_compile", action="store_false", dest="compile", default=argparse.SUPPRESS, help="don't")
    add("--grad_checkpoint", action="store_true", help="less memory for a third more work")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", metavar="DIR", help="folder with train/<class>/ and val/<class>/")
    add("--crop_scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of training crops")
    add("--mean", type=float, nargs="+", help="per channel, of pixels from 0 to 1; default: ImageNet's")
    add("--std", type=float, nargs="+", help="likewise; scripts/mean_std.py computes both")
    add("--exif", action="store_true", help="turn photographs as their EXIF orientation says")
    add("--max_bad_images", default=0.01, type=float, metavar="SHARE", help="of unreadable files; more stop the run")
    add("--num_workers", default=10, type=int, help="loader processes, at most one per core")
    add("--pin_mem", action="store_true", default=True, help="pin the loader's memory for faster copies to the GPU")
    add("--no_pin_mem", action="store_false", dest="pin_mem", default=argparse.SUPPRESS, help="don't")

    _add_run_flags(parser, shard=not several_rates, keep=defaults["keep"])
    parser.set_defaults(**defaults)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser, shard: bool, keep: int | None) -> None:
    """Where the run goes and comes from, and its processes; shard: --shard, too; keep: its default."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", help="checkpoints and log.txt; '' writes none")
    add("--log_dir", help="TensorBoard events; default: output_dir")
    add("--overwrite", action="store_true", help="start afresh where output_dir holds a run: it is removed")
    add("--save_freq", type=int, help="epochs between checkpoint-{epoch}.pth")
    add("--save_minutes", default=30.0, type=float, help="between checkpoint-last.pth in mid-epoch; 0: never")
    all_kept = "" if keep else "; default: all"
    add("--keep", type=int, metavar="N", help=f"newest checkpoints kept, with the best{all_kept}")
    add("--resume", default="", metavar="FILE_OR_URL", help="checkpoint to go on from; auto: the newest in output_dir")
    add("--resume_override", action="store_true", help="resume though the schedule's flags differ")
    add("--start_epoch", default=0, type=int, help="first epoch, where --resume gives none")
    add("--seed", default=0, type=int, help="each process adds its rank")
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")

    add = parser.add_argument_group("processes (set by torchrun, srun or mpirun)").add_argument
    add("--world_size", default=1, type=int, help="accepted for old launchers; the environment decides")
    add("--local_rank", "--local-rank", default=-1, type=int, help="accepted for old launchers")
    add("--dist_on_itp", action="store_true", help="read Open MPI's variables")
    add("--dist_url", default="env://", help="rendezvous address")
    add("--dist_timeout", default=30.0, type=float, metavar="MINUTES", help="longest wait for another process")
    if shard:
        add("--shard", action="store_true", help="spread the optimiser's state over the ranks (ZeRO-1)")


def add_classifier_flags(parser: argparse.ArgumentParser, *, global_pool: bool) -> None:
    """What fine-tuning and probing share: the head, its pooling, the encoder to start from, evaluation."""
    add = parser.add_argument_group("classifier").add_argument
    add("--finetune", default="", metavar="FILE_OR_URL", help="pre-trained checkpoint whose encoder to start from")
    add("--nb_classes", default=1000, type=int, help="width of the head")
    add("--global_pool", action="store_true", default=global_pool, help="classify the mean of the patch tokens")
    add("--cls_token", action="store_false", dest="global_pool", default=argparse.SUPPRESS, help="or the class token")
    add("--train_fraction", default=1.0, type=float, metavar="F", help="of every class, chosen by --seed")
    add("--confusion", default="", metavar="FILE", help="CSV of what evaluation took for what, accuracy per class")
    add("--crop_pct", type=float, help="evaluation's margin; default: 224/256, above 224 pixels 1")
    add("--eval", action="store_true", help="evaluate the checkpoint given by --resume, then stop")
    add("--eval_freq", default=1, type=int, help="epochs between evaluations")
    add("--dist_eval", action="store_true", help="share the evaluation among the processes")


def finish(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that follow other flags; one --blr is a number, several a list."""
    if isinstance(args.blr, list) and len(args.blr) == 1:
        args.blr = args.blr[0]
    if args.log_dir is None:
        args.log_dir = args.output_dir
    sides = args.input_size
    if isinstance(sides, list):
        args.input_size = sides[0] if len(set(sides)) == 1 and len(sides) < 3 else tuple(sides)
    if (usual := Pixels.usual(args.in_chans)) and args.mean is None and args.std is None:
        args.mean, args.std = map(list, usual)
    return args


MODEL_FLAGS = {
    "patch_size": "patch_size",
    "decoder_dim": "decoder_embed_dim",
    "decoder_depth": "decoder_depth",
    "decoder_heads": "decoder_num_heads",
}


def model_size(args: argparse.Namespace) -> dict[str, int | tuple[int, int]]:
    """The model's arguments that the flags set."""
    given = {theirs: getattr(args, ours) for ours, theirs in MODEL_FLAGS.items() if getattr(args, ours, None)}
    return {"img_size": args.input_size, "in_chans": args.in_chans} | given


def pixels(args: argparse.Namespace) -> Pixels:
    """How files become the model's input."""
    return Pixels(args.in_chans, tuple(args.mean), tuple(args.std), args.exif)


def loading(args: argparse.Namespace, device: torch.device) -> Loading:
    """Return how batches are loaded."""
    return Loading(args.batch_size, args.num_workers, args.pin_mem, args.seed, device)


def run_settings(args: argparse.Namespace, eval_freq: int) -> RunSettings:
    """Return how the run goes on, saves, and stops."""
    return RunSettings(
        epochs=args.epochs,
        save_freq=args.save_freq,
        save_minutes=args.save_minutes,
        eval_freq=eval_freq,
        max_bad_steps=args.max_bad_steps,
        max_bad_images=args.max_bad_images,
    )


def mixes(args: argparse.Namespace) -> bool:
    """Whether fine-tuning mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


# What a flag's number must satisfy: (test, words). Flags that a job lacks, and those left at None, are passed over.
AT_LEAST_1 = (lambda x: x >= 1, "must be at least 1")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "must not be negative")
POSITIVE = (lambda x: 0 < x < math.inf, "must be greater than 0")
SHARE = (lambda x: 0 <= x <= 1, "must lie between 0 and 1")
BETWEEN = (lambda x: 0 < x < 1, "must lie between 0 and 1, and keep and remove at least one patch")
BELOW_1 = (lambda x: 0 <= x < 1, "must be at least 0 and less than 1")
RANGES = {
    **dict.fromkeys(
        (
            "batch_size",
            "accum_iter",
            "epochs",
            "save_freq",
            "eval_freq",
            "keep",
            "max_bad_steps",
            "nb_classes",
            "input_size",
            "patch_size",
            "in_chans",
            "decoder_dim",
            "decoder_depth",
            "decoder_heads",
            "recount",
        ),
        AT_LEAST_1,
    ),
    **dict.fromkeys(
        (
            "warmup_epochs",
            "num_workers",
            "start_epoch",
            "weight_decay",
            "min_lr",
            "save_minutes",
            "monitor_freq",
            "mixup",
            "cutmix",
            "color_jitter",
            "lr",
            "blr",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("clip_grad", "layer_decay", "dist_timeout"), POSITIVE),
    "crop_pct": (lambda x: 0 < x <= 1, "must be greater than 0, and at most 1"),
    "seed": (lambda x: 0 <= x < 2**31, "must not be negative, and below 2147483648"),
    **dict.fromkeys(("train_fraction", "max_bad_images", "reprob", "mixup_prob", "mixup_switch_prob"), SHARE),
    **dict.fromkeys(("drop_path", "smoothing", "model_ema_decay"), BELOW_1),
    "mask_ratio": BETWEEN,
}


def check(args: argparse.Namespace, models: dict) -> None:
    """Raise UserError with every problem of the arguments at once, before any data is read."""
    problems = launchers.adopt(args.dist_on_itp, args.dist_url) + flag_problems(args, models) + _place_problems(args)
    if problems:
        raise UserError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def lock_output_dir(args: argparse.Namespace) -> None:
    """From here to its end the run has output_dir for itself. Raises UserError, on all ranks, where another has it."""
    if args.output_dir and not getattr(args, "eval", False):
        holder = dist.run_on_rank0(lambda: output_dir.lock_output_dir(args.output_dir))
        if holder:
            raise UserError(f"--output_dir {args.output_dir} is in use by another run, {holder}")


def flag_problems(args: argparse.Namespace, models: dict) -> list[str]:
    """What is wrong with the flags by themselves, wherever they are to run."""
    ranges = [
        f"--{name} {value} {words}"
        for name, (good, words) in RANGES.items()
        for value in _values(getattr(args, name, None))
        if not good(value)
    ]
    missing = "--data_path is missing: the folder that holds train/<class>/ and val/<class>/"
    return ranges + _model_problems(args, models) + _training_problems(args) + ([] if args.data_path else [missing])


def _values(value: object) -> list | tuple:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _model_problems(args: argparse.Namespace, models: dict) -> list[str]:
    if args.model not in models:
        return [f"--model {args.model} is unknown: choose one of {', '.join(models)}"]
    patch = args.patch_size or models[args.model].keywords["patch_size"]
    sides = _values(args.input_size)
    if len(sides) > 2:
        return [f"--input_size {' '.join(map(str, sides))}: one size, or height and width"]
    if min(sides) < 1 or patch < 1:
        return []  # said already
    if any(side % patch for side in sides):
        return [f"--input_size {' '.join(map(str, sides))} is not a multiple of the patch size, {patch}"]
    patches = math.prod(side // patch for side in (sides * 2)[:2])
    ratio = getattr(args, "mask_ratio", None)
    problems = _pixel_problems(args) + (_decoder_problems(args, models) if hasattr(args, "decoder_dim") else [])
    if ratio is not None and 0 < ratio < 1 and not 1 <= int(patches * (1 - ratio)) < patches:
        problems.append(f"--mask_ratio {ratio} must keep and remove at least one of {patches} patches")
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
    if min(args.std) <= 0:
        problems.append(f"--std {' '.join(map(str, args.std))}: must be greater than 0")
    return problems


def _decoder_problems(args: argparse.Namespace, models: dict) -> list[str]:
    width, heads = (
        given or models[args.model].keywords[name]
        for given, name in ((args.decoder_dim, "decoder_embed_dim"), (args.decoder_heads, "decoder_num_heads"))
    )
    if width > 0 and heads > 0 and (width % heads or width % 4):
        return [f"--decoder_dim {width} must be a multiple of 4 and of --decoder_heads {heads}"]
    return []


def _training_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        problems.append(f"--crop_scale {low} {high}: needs 0 < MIN <= MAX <= 1")
    if not getattr(args, "eval", False):
        problems += [
            f"--{name} {getattr(args, name)} must be less than --epochs {args.epochs}"
            for name in ("warmup_epochs", "start_epoch")
            if getattr(args, name) >= args.epochs
        ]
    if hasattr(args, "mixup"):
        if mixes(args) and args.batch_size % 2:
            problems.append(f"--batch_size {args.batch_size} must be even for mixup and cutmix")
        bounds = args.cutmix_minmax
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= 1):
            problems.append(f"--cutmix_minmax {' '.join(map(str, bounds))}: needs two numbers, 0 <= MIN < MAX <= 1")
        try:
            FinetuneTransform(32, (0.5, 1.0), None, args.aa, 0.0, "pixel", 1)
        except Exception:  # timm asserts, and parses with float()
            problems.append(f"--aa {args.aa} is no policy of timm's: for example rand-m9-mstd0.5-inc1, augmix-m3, none")
    if isinstance(args.blr, list):
        if args.lr is not None:
            problems.append("--lr gives one learning rate, --blr several: leave one out")
        if args.clip_grad is not None:
            problems.append("--clip_grad would make the heads of several --blr depend on each other: leave it out")
        if args.min_lr:
            problems.append("--min_lr would be another for each of several --blr: leave it out")
        if 0 in args.blr:
            problems.append("--blr 0 among several trains nothing: leave it out")
    if getattr(args, "train_fraction", 1) == 0:
        problems.append("--train_fraction 0 leaves nothing to train on")
    blocks = getattr(args, "trainable_blocks", None)
    if blocks is not None and (blocks < 0 or blocks % 0.5):
        problems.append(f"--trainable_blocks {blocks:g} must be a multiple of 0.5, not negative")
    if getattr(args, "probe", "") == "attentive" and isinstance(args.blr, list):
        problems.append("--probe attentive takes one --blr: the heads of a sweep would share its query")
    if getattr(args, "eval", False) and not args.resume:
        problems.append("--eval needs --resume FILE, the checkpoint to evaluate")
    return problems


def device_problems(name: str) -> list[str]:
    """What is wrong with --device, if anything."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"--device {name} is unknown: choose cuda, mps or cpu"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"--device {name}: no CUDA GPU was found; leave the flag out to take what is there"]
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        processes = launchers.gpus_needed(gpus)
        if device.index is not None and processes > 1:
            return [f"--device {name}: the {processes} processes of this machine take a GPU each: --device cuda"]
        needed = processes if device.index is None else device.index + 1
        if needed > gpus:
            return [f"--device {name}: the processes of this machine need {needed} GPU(s), one each, and it has {gpus}"]
    if device.type == "mps" and not torch.backends.mps.is_available():
        return ["--device mps: not available on this machine"]
    return [] if device.type in ("cuda", "mps", "cpu") else [f"--device {name}: choose cuda, mps or cpu"]


def _place_problems(args: argparse.Namespace) -> list[str]:
    """Device, launcher, files and folders."""
    problems = device_problems(args.device)
    if args.data_path and not Path(args.data_path).is_dir():
        problems.append(f"--data_path {args.data_path}: no such folder; it must hold train/<class>/<images>")
    for name in ("resume", "finetune"):
        source = getattr(args, name, "")
        known = not source or is_url(source) or Path(source).is_file() or (name == "resume" and source == "auto")
        if not known and not weights_in(Path(source)):
            problems.append(f"--{name} {source}: no such file, nor a folder with model.safetensors")
    if table := getattr(args, "confusion", ""):
        why = "it is a folder" if Path(table).is_dir() else output_dir.unwritable(Path(table).parent)
        problems += [f"--confusion {table} can't be written to: {why}"] if why else []
    if args.resume == "auto" and not args.output_dir:
        problems.append("--resume auto looks into --output_dir, which is empty")
    return problems if getattr(args, "eval", False) else problems + _output_problems(args)


def _output_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in ("output_dir", "log_dir"):
        path = getattr(args, name)
        if path and (why := output_dir.unwritable(path)) and (name == "output_dir" or path != args.output_dir):
            problems.append(f"--{name} {path} can't be written to: {why}")
    start = Path(getattr(args, "finetune", ""))
    if args.overwrite and fnmatch(start.name, "checkpoint-*.pth") and is_inside(str(start), args.output_dir):
        problems.append(f"--overwrite would remove --finetune {args.finetune} itself: choose another --output_dir")
    if not args.output_dir or args.overwrite or args.resume == "auto" or is_inside(args.resume, args.output_dir):
        return problems
    patterns = "log.txt", "checkpoint-*.pth"
    there = sorted(path.name for pattern in patterns for path in Path(args.output_dir).glob(pattern))
    if there:
        what = "--resume auto goes on with it, " if there != ["log.txt"] else ""
        problems.append(
            f"--output_dir {args.output_dir} holds another run ({there[0]}): {what}--overwrite removes it, or choose "
            "another folder"
        )
    return problems

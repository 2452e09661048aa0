"""The flags that the jobs share, and what the rest of the code takes from them (their validation: util/checks.py).

Flags that the reference also has keep its names, meanings and defaults, with the exceptions listed in docs/flags.md.
"""

import argparse
from pathlib import Path

import torch

from util import speed
from util.command_line import Parser
from util.data.class_names import read_class_names
from util.data.images import PixelSpec
from util.data.loaders import Loading
from util.data.splits import DataSpec
from util.disk import output_path
from util.distributed import dist
from util.loop import RunSettings
from util.report.scores import Evaluation

# The flags.


def common_parser(description: str, models: dict, several_rates: bool = False, **defaults: object) -> Parser:
    """Create a parser with the flags that all three jobs share.

    Args:
        description: What the job does, for --help.
        models: The job's models, by name.
        several_rates: Whether --blr takes several values (linear probing, whose optimiser can't be sharded).
        **defaults: The job's own defaults, by the flags' names; "keep" must be among them.
    """
    parser = Parser(description)
    _add_model_flags(parser, models)
    _add_training_flags(parser, several_rates)
    _add_speed_flags(parser)
    _add_data_flags(parser)
    _add_run_flags(parser, keeps_all=not defaults["keep"])
    _add_process_flags(parser, shard=not several_rates)
    parser.set_defaults(**defaults)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser, models: dict) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help=f"architecture: one of {', '.join(models)}")
    add(
        "--input_size",
        default=224,
        type=int,
        nargs="+",
        metavar="SIDE",
        help="size of the model's input in pixels: one side, or height and width",
    )
    add("--patch_size", type=int, metavar="SIDE", help="side of a patch in pixels; default: the model's")
    add("--in_chans", default=3, type=int, metavar="C", help="number of image channels")


def _add_training_flags(parser: argparse.ArgumentParser, several_rates: bool) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=int, help="images per batch, in each process")
    add("--accum_iter", default=1, type=int, help="gradient accumulation: batches per update")
    add("--epochs", type=int, help="length of the run and of its learning rate schedule, in epochs")
    add("--warmup_epochs", type=int, help="epochs of linear warm-up at the start of the schedule")
    add("--lr", type=float, help="learning rate; default: blr * effective batch size / 256")
    blr_help = "base learning rate, for an effective batch of 256 images"
    if several_rates:
        blr_help += "; several values train a head each; default: 0.1, or 1e-3 with --probe attentive"
        add("--blr", type=float, nargs="+", metavar="BLR", help=blr_help)
    else:
        add("--blr", type=float, help=blr_help)
    add("--min_lr", type=float, help="learning rate at the end of the schedule")
    decay_help = "weight decay; none for 1-D parameters, and in fine-tuning none for cls_token and pos_embed"
    add("--weight_decay", type=float, help=decay_help)
    add("--clip_grad", type=float, metavar="NORM", help="clip the gradients to this total norm; default: no clipping")
    add(
        "--max_bad_steps",
        default=5,
        type=int,
        metavar="N",
        help="stop the run after N updates in a row that were skipped because gradients were not finite",
    )
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision; auto: bf16 where the hardware is fast at it, fp16 on older GPUs, else off",
    )


def _add_speed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speed").add_argument
    add(
        "--attention",
        default="auto",
        choices=speed.ATTENTION,
        help="attention implementation; auto: fused, or plain for bf16 on a CPU",
    )
    add(
        "--compile",
        action="store_true",
        default=None,
        help="compile the blocks with torch.compile, which takes about a minute; default: on CUDA, where it works",
    )
    add(
        "--no_compile",
        action="store_false",
        dest="compile",
        default=argparse.SUPPRESS,
        help="do not compile the blocks",
    )
    add(
        "--grad_checkpoint",
        action="store_true",
        help="activation checkpointing: much less memory for about a third more computation",
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data_path",
        metavar="DIR",
        help="folder with train/<class>/<images> or train.tar, and the same for val; required; pre-training needs no "
        "classes and no val",
    )
    add(
        "--crop_scale",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="area of a random training crop: smallest and largest share of the image",
    )
    mean_help = "mean of each channel, of pixel values from 0 to 1; default: ImageNet's"
    add("--mean", type=float, nargs="+", metavar="M", help=mean_help)
    std_help = "standard deviation of each channel (scripts/mean_std.py computes both); default: ImageNet's"
    add("--std", type=float, nargs="+", metavar="S", help=std_help)
    add("--exif", action="store_true", help="rotate images as their EXIF orientation says")
    add_val_flags(group)
    add_size_limit(group)
    add(
        "--max_bad_images",
        default=0.01,
        type=float,
        metavar="SHARE",
        help="stop the run if more than this share of the training images is unreadable",
    )
    add_num_workers(group)
    add("--pin_mem", action="store_true", default=True, help="pin the loader's memory for faster copies to the GPU")
    no_pin_help = "do not pin the loader's memory"
    add("--no_pin_mem", action="store_false", dest="pin_mem", default=argparse.SUPPRESS, help=no_pin_help)


def add_num_workers(parser: argparse.ArgumentParser) -> None:
    """Add --num_workers, for every script that loads images in processes of their own."""
    workers_help = "data loading processes for each process, at most one per CPU core"
    parser.add_argument("--num_workers", default=10, type=int, help=workers_help)


def add_size_limit(parser: argparse.ArgumentParser) -> None:
    """Add --max_megapixels, for every script that decodes images."""
    pixels_help = "largest image that is decoded; default: Pillow's limit, 179"
    parser.add_argument("--max_megapixels", type=float, metavar="MEGAPIXELS", help=pixels_help)


def add_val_flags(parser: argparse.ArgumentParser) -> None:
    """Add --val_fraction and --val_seed, for the jobs, and for scripts that must choose the same images."""
    fraction_help = "hold this share of the training images out for validation"
    parser.add_argument("--val_fraction", default=0.0, type=float, metavar="SHARE", help=fraction_help)
    seed_help = "determines which images --val_fraction holds out"
    parser.add_argument("--val_seed", default=0, type=int, metavar="SEED", help=seed_help)


def _add_run_flags(parser: argparse.ArgumentParser, keeps_all: bool) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints and log.txt; '': write no files")
    add("--log_dir", metavar="DIR", help="TensorBoard events; default: --output_dir")
    wandb_help = "log to this project of Weights & Biases, too (pip install wandb); WANDB_MODE=offline: to files"
    add("--wandb", default="", metavar="PROJECT", help=wandb_help)
    add("--overwrite", action="store_true", help="remove the run that --output_dir holds, and start afresh")
    add("--save_freq", type=int, metavar="EPOCHS", help="epochs between saves of checkpoint-{epoch}.pth")
    add(
        "--save_minutes",
        default=30.0,
        type=float,
        metavar="MINUTES",
        help="minutes between saves of checkpoint-last.pth within an epoch; 0: never",
    )
    keep_help = "keep the newest N of checkpoint-{epoch}.pth" + ("; default: all" if keeps_all else ", and the best")
    add("--keep", type=int, metavar="N", help=keep_help)
    add(
        "--resume",
        default="",
        metavar="FILE_OR_URL",
        help="checkpoint to resume from; auto: the newest valid one in --output_dir, or start afresh if it has none",
    )
    add(
        "--resume_override",
        action="store_true",
        help="resume although flags of the schedule differ from the checkpoint's",
    )
    add(
        "--start_epoch",
        default=0,
        type=int,
        metavar="EPOCH",
        help="number of the first epoch, unless a checkpoint of --resume stores it",
    )
    add("--seed", default=0, type=int, help="random seed, to which each process adds its rank")
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")


def _add_process_flags(parser: argparse.ArgumentParser, shard: bool) -> None:
    add = parser.add_argument_group("processes (set by torchrun, srun or mpirun)").add_argument
    ignored = "accepted for old launchers, and ignored: the environment decides"
    add("--world_size", default=1, type=int, help=ignored)
    add("--local_rank", "--local-rank", default=-1, type=int, help=ignored)
    add("--dist_on_itp", action="store_true", help="read the ranks from Open MPI's variables (mpirun)")
    add("--dist_url", default="env://", metavar="URL", help="rendezvous address; env://: MASTER_ADDR and MASTER_PORT")
    add("--dist_timeout", default=30.0, type=float, metavar="MINUTES", help="longest wait for another process")
    if shard:
        add("--shard", action="store_true", help="shard the optimiser's state over the processes (ZeRO stage 1)")


def add_classifier_flags(parser: argparse.ArgumentParser, *, global_pool: bool) -> None:
    """Add the flags that fine-tuning and linear probing share: encoder, head, evaluation.

    Args:
        parser: From `common_parser`.
        global_pool: Default of --global_pool.
    """
    add = parser.add_argument_group("classifier").add_argument
    add(
        "--finetune",
        default="",
        metavar="FILE_OR_URL",
        help="pre-trained checkpoint to take the encoder from; default: random weights",
    )
    add(
        "--nb_classes", default=1000, type=int, metavar="N", help="number of classes; must be that of the class folders"
    )
    add("--global_pool", action="store_true", default=global_pool, help="classify from the mean of the patch tokens")
    cls_help = "classify from the class token" if global_pool else "classify from the class token; this is the default"
    add("--cls_token", action="store_false", dest="global_pool", default=argparse.SUPPRESS, help=cls_help)
    add(
        "--train_fraction",
        default=1.0,
        type=float,
        metavar="SHARE",
        help="train on this share of each class's images, which --seed selects",
    )
    names_help = (
        "names of the class folders in the order of the classes' numbers, one per line or as JSON; default: those in "
        "the checkpoint, or the folders, sorted"
    )
    add("--class_names", default="", metavar="FILE", help=names_help)
    weights_help = "balanced: the loss weighs an image by the inverse of its class's share"
    add("--class_weights", default="none", choices=("none", "balanced"), help=weights_help)
    best_help = "figure by which the best checkpoint, and of several --blr the best head, is chosen"
    add("--best_by", default="acc1", choices=("acc1", "balanced_acc"), help=best_help)
    add("--confusion", default="", metavar="FILE", help="CSV file for the confusion matrix and each class's accuracy")
    add(
        "--crop_pct",
        type=float,
        metavar="SHARE",
        help="side of evaluation's centre crop as a share of the resized image; default: 224/256, above 224 pixels 1",
    )
    add("--eval", action="store_true", help="evaluate the checkpoint of --resume on val/, then stop")
    add("--eval_freq", default=1, type=int, metavar="EPOCHS", help="epochs between evaluations")
    add("--dist_eval", action="store_true", help="split the evaluation between the processes")


def finish(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in, in place, the defaults that follow from other flags, and simplify lists of one value.

    A single --blr becomes a number, equal sides of --input_size become one.
    """
    if isinstance(args.blr, list) and len(args.blr) == 1:
        args.blr = args.blr[0]
    if args.log_dir is None:
        args.log_dir = args.output_dir
    for name in ("output_dir", "log_dir", "confusion"):
        if ".." in Path(getattr(args, name, "")).parts:
            setattr(args, name, str(output_path(getattr(args, name))))
    sides = args.input_size
    if isinstance(sides, list):
        args.input_size = sides[0] if len(set(sides)) == 1 and len(sides) < 3 else tuple(sides)
    if (usual := PixelSpec.default_mean_std(args.in_chans)) and args.mean is None and args.std is None:
        args.mean, args.std = map(list, usual)
    return args


# From flags to arguments of other modules.

# Flag: the model's argument that it sets.
MODEL_FLAGS = {
    "patch_size": "patch_size",
    "decoder_dim": "decoder_embed_dim",
    "decoder_depth": "decoder_depth",
    "decoder_heads": "decoder_num_heads",
}


def model_size(args: argparse.Namespace) -> dict[str, int | tuple[int, int]]:
    """Return the constructor arguments that give a model's shape.

    These are the input's size and channels, and those of MODEL_FLAGS that were given. What else a model takes
    (norm_pix_loss, num_classes, ...) is left to the caller.
    """
    overrides = {argument: getattr(args, flag) for flag, argument in MODEL_FLAGS.items() if getattr(args, flag, None)}
    return {"img_size": args.input_size, "in_chans": args.in_chans} | overrides


def pixels(args: argparse.Namespace) -> PixelSpec:
    """Return how image files become the model's input."""
    return PixelSpec(args.in_chans, tuple(args.mean), tuple(args.std), args.exif, args.max_megapixels)


def loading(args: argparse.Namespace, device: torch.device) -> Loading:
    """Return how batches are loaded."""
    return Loading(args.batch_size, args.num_workers, args.pin_mem, args.seed, device)


def data(args: argparse.Namespace) -> DataSpec:
    """Return the run's images. With --eval the checkpoint gives the classes their numbers."""
    names = None if getattr(args, "eval", False) else given_class_names(args)
    return DataSpec(args.data_path, args.val_fraction, args.val_seed, names)


def given_class_names(args: argparse.Namespace) -> list[str] | None:
    """Return the names in the file of --class_names; None without the flag.

    Raises:
        UserError: It can't be used.
    """
    file = getattr(args, "class_names", "")
    return read_class_names(file) if file else None


def evaluation(args: argparse.Namespace, head_names: list[str] | None = None) -> Evaluation:
    """Return how a classifier is evaluated, with the names of a sweep's heads."""
    return Evaluation(args.dist_eval, head_names, args.confusion, args.best_by)


def run_settings(args: argparse.Namespace, eval_freq: int) -> RunSettings:
    """Return how the run starts, goes on, saves, and stops."""
    return RunSettings(
        epochs=args.epochs,
        accum_iter=args.accum_iter,
        save_freq=args.save_freq,
        save_minutes=args.save_minutes,
        eval_freq=eval_freq,
        max_bad_steps=args.max_bad_steps,
        max_bad_images=args.max_bad_images,
        best_by=getattr(args, "best_by", "acc1"),
        start_epoch=args.start_epoch,
        resume_override=args.resume_override,
        log_dir=args.log_dir,
    )


def mixes(args: argparse.Namespace) -> bool:
    """Return whether fine-tuning mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def starts_pretrained(args: argparse.Namespace, source: str) -> bool:
    """Return whether a classifier is to load the encoder of --finetune; print a notice if all its weights are random.

    Args:
        args: The run's flags.
        source: The checkpoint that the run resumes, which has the encoder already; "": none.
    """
    if not (args.finetune or source):
        dist.print_rank0("notice: without --finetune the encoder starts from random weights")
    return bool(args.finetune) and not source

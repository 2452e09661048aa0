"""The flags that the jobs share, and their validation. Names, meanings and defaults are the reference's."""

import argparse
import os
from pathlib import Path

import torch

from util import dist
from util.errors import UserError
from util.misc import is_url


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default behind every flag that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False or action.default == ""
        return action.help if bare else super()._get_help_string(action)


def common_parser(
    description: str,
    models: dict,
    *,
    model: str,
    batch_size: int,
    epochs: int,
    warmup_epochs: int,
    weight_decay: float,
    blr: float,
    min_lr: float,
    crop_scale: tuple[float, float],
    save_freq: int,
) -> argparse.ArgumentParser:
    """The flags of every job, with the job's own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", default=model, metavar="NAME", help=f"one of {', '.join(models)}")
    add("--input_size", default=224, type=int, help="height and width of the images, pixels")
    add("--patch_size", type=int, help="default: the model's")

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", default=batch_size, type=int, help="per process")
    add("--accum_iter", default=1, type=int, help="batches accumulated per update")
    add("--epochs", default=epochs, type=int, help="length of the whole schedule")
    add("--warmup_epochs", default=warmup_epochs, type=int, help="of linear warm-up")
    add("--lr", type=float, help="learning rate; default: blr * effective batch size / 256")
    add("--blr", default=blr, type=float, help="base learning rate, per 256 images")
    add("--min_lr", default=min_lr, type=float, help="learning rate at the end")
    add("--weight_decay", default=weight_decay, type=float, help="1-D parameters never decay")
    add("--clip_grad", type=float, help="largest gradient norm; default: no clipping")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision; auto: bf16 where it is fast")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", metavar="DIR", help="folder with train/<class>/ and val/<class>/")
    add("--crop_scale", default=crop_scale, type=float, nargs=2, metavar=("MIN", "MAX"), help="area of training crops")
    add("--num_workers", default=10, type=int, help="loader processes, at most one per core")
    add("--pin_mem", action="store_true", default=True, help="pin the loader's memory for faster copies to the GPU")
    add("--no_pin_mem", action="store_false", dest="pin_mem", default=argparse.SUPPRESS, help="don't")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", help="checkpoints and log.txt; '' writes none")
    add("--log_dir", help="TensorBoard events; default: output_dir")
    add("--save_freq", default=save_freq, type=int, help="epochs between checkpoints")
    add("--resume", default="", metavar="FILE_OR_URL", help="checkpoint to go on from")
    add("--start_epoch", default=0, type=int, help="first epoch, where --resume gives none")
    add("--seed", default=0, type=int, help="each process adds its rank")
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")

    add = parser.add_argument_group("processes (set by torchrun)").add_argument
    add("--world_size", default=1, type=int, help="accepted for old launchers; the environment decides")
    add("--local_rank", "--local-rank", default=-1, type=int, help="accepted for old launchers")
    add("--dist_on_itp", action="store_true", help="read Open MPI's variables")
    add("--dist_url", default="env://", help="rendezvous address")
    return parser




def add_classifier_flags(parser: argparse.ArgumentParser, *, global_pool: bool) -> None:
    """What fine-tuning and probing share: the head, its pooling, the encoder to start from, evaluation."""
    add = parser.add_argument_group("classifier").add_argument
    add("--finetune", default="", metavar="FILE_OR_URL", help="pre-trained checkpoint whose encoder to start from")
    add("--nb_classes", default=1000, type=int, help="width of the head")
    add("--global_pool", action="store_true", default=global_pool, help="classify the mean of the patch tokens")
    add("--cls_token", action="store_false", dest="global_pool", default=argparse.SUPPRESS, help="or the class token")
    add("--crop_pct", type=float, help="evaluation's margin; default: 224/256, above 224 pixels 1")
    add("--eval", action="store_true", help="evaluate the checkpoint given by --resume, then stop")
    add("--eval_freq", default=1, type=int, help="epochs between evaluations")
    add("--dist_eval", action="store_true", help="share the evaluation among the processes")


def finish(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that follow other flags."""
    if args.log_dir is None:
        args.log_dir = args.output_dir
    return args


def model_size(args: argparse.Namespace) -> dict[str, int]:
    """The model's arguments that the shared flags set."""
    return {"img_size": args.input_size} | ({"patch_size": args.patch_size} if args.patch_size else {})


def mixes(args: argparse.Namespace) -> bool:
    """Whether fine-tuning mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args: argparse.Namespace, models: dict) -> None:
    """Raise UserError with every problem of the arguments at once, before anything is read."""
    problems = []

    def need(good: bool, message: str) -> None:
        if not good:
            problems.append(message)

    need(args.model in models, f"--model {args.model} is unknown: choose one of {', '.join(models)}")
    patch = args.patch_size or (models[args.model].keywords["patch_size"] if args.model in models else 1)
    need(
        patch > 0 and args.input_size > 0 and args.input_size % patch == 0,
        f"--input_size {args.input_size} is not a multiple of the patch size, {patch}",
    )
    for name in ("batch_size", "accum_iter", "epochs", "save_freq", "eval_freq"):
        value = getattr(args, name, 1)
        need(value >= 1, f"--{name} {value} must be at least 1")
    for name in ("warmup_epochs", "num_workers", "start_epoch", "weight_decay", "min_lr"):
        need(getattr(args, name) >= 0, f"--{name} {getattr(args, name)} must not be negative")
    evaluating = getattr(args, "eval", False)
    need(
        evaluating or args.warmup_epochs < args.epochs,
        f"--warmup_epochs {args.warmup_epochs} must be less than --epochs {args.epochs}",
    )
    low, high = args.crop_scale
    need(0 < low <= high <= 1, f"--crop_scale {low} {high}: needs 0 < MIN <= MAX <= 1")
    need(args.data_path is not None, "--data_path is missing: the folder that holds train/<class>/ and val/<class>/")
    if hasattr(args, "mask_ratio"):
        patches = (args.input_size // max(patch, 1)) ** 2
        need(
            0 < args.mask_ratio < 1 and 1 <= int(patches * (1 - args.mask_ratio)) < patches,
            f"--mask_ratio {args.mask_ratio} must keep and remove at least one of {patches} patches",
        )
    if hasattr(args, "mixup") and mixes(args):
        need(args.batch_size % 2 == 0, f"--batch_size {args.batch_size} must be even for mixup and cutmix")
    need(
        not args.device.startswith("cuda") or torch.cuda.is_available(),
        f"--device {args.device}: no CUDA GPU was found; leave the flag out to take what is there",
    )
    need(
        not args.dist_on_itp or "OMPI_COMM_WORLD_RANK" in os.environ,
        "--dist_on_itp reads Open MPI's variables, and OMPI_COMM_WORLD_RANK is not set: start under mpirun",
    )
    if evaluating:
        need(bool(args.resume), "--eval needs --resume FILE, the checkpoint to evaluate")
    for name in ("resume", "finetune"):
        source = getattr(args, name, "")
        need(not source or is_url(source) or Path(source).is_file(), f"--{name} {source}: no such file")
    if problems:
        raise UserError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))

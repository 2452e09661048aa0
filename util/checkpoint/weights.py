"""Weights out of a checkpoint into a model: all of them, or an encoder into a classifier; and what to say where they
don't fit."""

import re

import torch
from timm.layers import to_2tuple
from torch import nn

from util.checkpoint.files import checkpoint_args, load_checkpoint
from util.checkpoint.formats import describe
from util.data.datasets import class_differences, some
from util.data.transforms import CentreCrop
from util.distributed import dist
from util.errors import UserError
from util.pos_embed import resize_pos_embed


def load_model(
    source: str, checkpoint: dict, model: nn.Module, args: dict, class_to_idx: dict[str, int] | None = None
) -> None:
    """Load a checkpoint's weights; every key must match, and so must the classes. Raises UserError otherwise."""
    state, own = checkpoint["model"], model.state_dict()
    _refuse_misfits(source, checkpoint, model, args, set(own) - set(state), set(state) - set(own))
    stored = checkpoint.get("class_to_idx")
    if stored and class_to_idx and stored != class_to_idx:
        differing = class_differences(list(stored), list(class_to_idx), source, "--data_path") or "their order differs"
        raise UserError(f"{source} was trained on other classes, and would name the wrong ones. {differing}")
    model.load_state_dict(state)


def load_for_eval(source: str, model: nn.Module, args: dict, class_to_idx: dict[str, int]) -> None:
    """Load the weights to evaluate, with args["model_ema"] their running average. Raises UserError where they don't fit
    the model or the folders' classes."""
    if not source:
        raise UserError(f"--eval --resume auto: no checkpoint in {args['output_dir']} to evaluate")
    checkpoint = load_checkpoint(source, ema=args.get("model_ema", False))
    load_model(source, checkpoint, model, args, class_to_idx)
    _compare_pixels(source, checkpoint, args, ("mean", "std", "crop_pct", "exif"))
    dist.print_rank0(f"weights from {source}")


def load_pretrained(source: str, model: nn.Module, args: dict | None = None) -> tuple[set[str], set[str]]:
    """Put a pre-trained encoder into a classifier, before its head is made ready for training (paper, A.1).

    What the classifier has and the file lacks must be the head (and fc_norm when pooling); what the file has beyond
    it must be a decoder, a head (never taken over), or the norm of the other pooling. Positions are resized to the
    model's grid.

    Args:
        source: File or address.
        model: The classifier.
        args: The run's flags, for the messages.

    Returns:
        The names that are new in the model, and those of the file that were not used; both are printed, too.

    Raises:
        UserError: Anything else is missing or surplus; it is named.
    """
    args = args or {}
    checkpoint, own = load_checkpoint(source), model.state_dict()
    state = {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}
    unused = {name for name in checkpoint["model"] if name.startswith("head.")} | set(checkpoint.get("left_out", ()))
    heads = (checkpoint.get("model_config") or {}).get("num_heads", model.config["num_heads"])
    if heads != model.config["num_heads"]:  # they leave no trace in the weights
        raise UserError(
            f"{source} does not fit: attention heads: {heads} in the file, {model.config['num_heads']} here "
            f"(--model {args.get('model')})"
        )
    resize_positions(state, checkpoint, model)

    # What may be missing, what may be left over.
    missing, surplus = set(own) - set(state), set(state) - set(own)
    head = {name for name in own if name.startswith(("head.", "attn_pool.", "fc_norm."))}
    decoder = {name for name in surplus if name.startswith("decoder_") or name == "mask_token"}
    other_norm = surplus & {"norm.weight", "norm.bias"}
    if "norm.weight" in state:
        other_norm |= {name for name in surplus if name.startswith("fc_norm.")}

    # The file is described with the model's own head, which it need not have.
    encoder = {name: value for name, value in state.items() if name not in decoder}
    encoder |= {name: own[name] for name in head if "norm.weight" in state or not name.startswith("fc_norm.")}
    config = {**(checkpoint.get("model_config") or {}), "model": None}  # an autoencoder's name is never a classifier's
    described = {**checkpoint, "model": encoder, "model_config": config}
    _refuse_misfits(source, described, model, args, missing - head, surplus - decoder - other_norm)

    _compare_pixels(source, checkpoint, args, ("mean", "std"))
    model.load_state_dict(state, strict=False)
    surplus |= unused
    new, dropped = (", ".join(_modules(keys)) or "nothing" for keys in (missing, surplus))
    dist.print_rank0(
        f"encoder from {source} ({describe(checkpoint)}); new here: {new}; in the file but not used: {dropped}"
    )
    return missing, surplus


def resize_positions(state: dict[str, torch.Tensor], checkpoint: dict, model: nn.Module) -> None:
    """Bring pos_embed in a state dict to the model's grid, where it was made for another."""
    if "pos_embed" not in state:
        return
    if not state["pos_embed"].any():
        dist.print_rank0("warning: the file's positions are all zero, so its model cannot tell where a patch was")
    grid, rows = model.patch_embed.grid_size, state["pos_embed"].shape[1] - 1
    config = checkpoint.get("model_config") or {}
    side = round(rows**0.5)
    old = (side, side)
    if "img_size" in config:
        old = tuple(length // config["patch_size"] for length in to_2tuple(config["img_size"]))
    if rows == old[0] * old[1] and old != grid:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old, grid)
        dist.print_rank0(f"positions resized from {old[0]} x {old[1]} to {grid[0]} x {grid[1]}")


def _compare_pixels(source: str, checkpoint: dict, args: dict, names: tuple[str, ...]) -> None:
    """Say where images are taken otherwise than the checkpoint's job took them."""
    stored = checkpoint_args(checkpoint)
    for name in names:
        if name not in stored or name not in args:
            continue
        theirs, ours = stored[name], args[name]
        if name == "crop_pct":  # by default it follows the size
            theirs, ours = (CentreCrop(args["input_size"], share).cover for share in (theirs, ours))
        if plain(theirs) != plain(ours):
            default = "at its default"
            dist.print_rank0(
                f"notice: {source} was made with --{name} {stored[name] or default}, here it is {args[name] or default}"
            )


def plain(value: object) -> object:
    """A flag's value in the form that compares: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def _refuse_misfits(
    source: str, checkpoint: dict, model: nn.Module, args: dict, missing: set[str], surplus: set[str]
) -> None:
    """Raise UserError if keys are missing or surplus, or shapes differ, with file and model described side by side.

    Args:
        source: The file's name.
        checkpoint: What it holds.
        model: The model that is to take it.
        args: The run's flags.
        missing: Keys that the model needs and the file lacks.
        surplus: Keys of the file that the model has no place for.
    """
    state, own = checkpoint["model"], model.state_dict()
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if not missing and not surplus and not shapes:
        return
    config = checkpoint.get("model_config") or {}
    theirs = describe_weights(state, {"model": args.get("model"), **config})
    ours = describe_weights(own, {**model.config, "model": args.get("model")})
    problems = [
        f"{name}: {theirs[name]} in the file, {ours[name]} here ({FLAGS[name]})"
        for name in theirs
        if name in ours and theirs[name] != ours[name]
    ]
    problems += [f"the file lacks {some(sorted(missing), 6)}"] if missing else []
    problems += [f"the model has no {some(sorted(surplus), 6)}"] if surplus else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    remedy = "pass the flags that the file was made with, or another file"
    if "kind" in theirs and theirs["kind"] != ours["kind"]:
        remedy = "to start a fine-tuning or a probe from its encoder, pass it as --finetune"
    if "patch_embed.proj.weight" not in state:
        remedy = "it holds no Vision Transformer in names that are known here: the reference's, timm's, Hugging Face's"
    raise UserError("\n  ".join([f"{source} does not fit: {remedy}", *problems]))


# What describes a model's weights, and the flag that sets it.
FLAGS = {
    "kind": "the script",
    "model": "--model",
    "encoder width": "--model",
    "encoder blocks": "--model",
    "attention heads": "--model",
    "channels": "--in_chans",
    "patch size": "--patch_size",
    "patches": "--input_size",
    "pooling": "--global_pool, --cls_token",
    "classes": "--nb_classes",
    "heads": "a head for each --blr",
}


def describe_weights(state: dict[str, torch.Tensor], config: dict) -> dict[str, object]:
    """Describe a model by its weights: a value for each of FLAGS that they, or its config, show."""
    if "patch_embed.proj.weight" not in state or state["patch_embed.proj.weight"].ndim != 4:
        return {}
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    found = {
        "model": config.get("model"),
        "encoder width": width,
        "encoder blocks": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "attention heads": config.get("num_heads"),
        "channels": channels,
        "patch size": patch[0] if len(set(patch)) == 1 else tuple(patch),
        "patches": state["pos_embed"].shape[1] - 1 if "pos_embed" in state else None,
        **_describe_head(state),
    }
    return {name: value for name, value in found.items() if value is not None}


def _describe_head(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Describe what follows the encoder: a decoder, or a classifier's pooling and head."""
    if "decoder_pred.weight" in state:
        return {"kind": "autoencoder (main_pretrain.py)"}
    pooling = "mean of the patches" if "fc_norm.weight" in state else "class token"
    heads = [name for name in state if re.fullmatch(r"head\.1\.heads\.\d+\.weight", name)]
    for name, kind in (
        ("head.weight", "classifier (main_finetune.py)"),
        ("head.1.weight", "probe (main_linprobe.py)"),
        ("head.1.heads.0.weight", "probe (main_linprobe.py)"),
    ):
        if name in state:
            return {"kind": kind, "pooling": pooling, "classes": len(state[name]), "heads": max(1, len(heads))}
    return {"kind": "encoder, without head or decoder"}


def _modules(keys: set[str]) -> list[str]:
    """The keys by their outermost module: blocks.* for every key of the blocks."""
    return sorted({name if "." not in name else name.split(".")[0] + ".*" for name in keys})

"""Weights out of a checkpoint into a model: all of them, or an encoder into a classifier; and what to say where they
don't fit."""

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
    _complain(source, _likely(checkpoint, model, args), model, state, set(own) - set(state), set(state) - set(own))
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
    model's grid. Prints and returns the names that are new and those that were not used; raises UserError, naming the
    keys, for anything else. args: the run's flags, for the messages.
    """
    args = args or {}
    checkpoint, own = load_checkpoint(source), set(model.state_dict())
    state = {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}
    unused = {name for name in checkpoint["model"] if name.startswith("head.")} | set(checkpoint.get("left_out", ()))
    head = {name for name in own if name.startswith(("head.", "attn_pool.", "fc_norm."))}
    left_out = {
        name
        for name in set(state) - own
        if name.startswith("decoder_")
        or name in ("mask_token", "norm.weight", "norm.bias")
        or (name.startswith("fc_norm.") and "norm.weight" in state)
    }
    heads = (checkpoint.get("model_config") or {}).get("num_heads", model.config["num_heads"])
    if heads != model.config["num_heads"]:  # they leave no trace in the weights
        raise UserError(
            f"{source} does not fit: its attention has {heads} heads, --model {args.get('model')} has "
            f"{model.config['num_heads']}"
        )
    resize_positions(state, checkpoint, model)
    missing, surplus = own - set(state), set(state) - own
    _complain(source, _pretrained_hint(checkpoint, model, args), model, state, missing - head, surplus - left_out)
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


def _complain(source: str, hint: str, model: nn.Module, state: dict, missing: set[str], surplus: set[str]) -> None:
    """Raise UserError, with a hint at the reason, if keys are missing or surplus, or shapes differ."""
    own = model.state_dict()
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [f"the file lacks {some(sorted(missing), 6)}"] if missing else []
    problems += [f"the model has no {some(sorted(surplus), 6)}"] if surplus else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    if problems:
        raise UserError("\n  ".join([f"{source} does not fit: {hint}", *problems]))


def _likely(checkpoint: dict, model: nn.Module, args: dict) -> str:
    """What the mismatch most likely comes from, and what to do about it."""
    state, own = checkpoint["model"], model.state_dict()
    name = (checkpoint.get("model_config") or {}).get("model", args.get("model"))
    if "decoder_pred.weight" in state and "decoder_pred.weight" not in own:
        return "it is an autoencoder, of pre-training: pass it as --finetune to start from its encoder"
    if name != args.get("model"):
        return f"it holds {name}, --model is {args.get('model')}: pass --model {name}"
    if "decoder_pred.weight" in own and "decoder_pred.weight" not in state:
        return "it has no decoder, so it can't go on with pre-training; it would do as --finetune of the other scripts"
    if "head.weight" in own and "head.1.weight" in state:
        return "its head is that of main_linprobe.py"
    if "head.1.weight" in own and "head.weight" in state:
        return "its head is that of main_finetune.py"
    if any(name.startswith("head.1.heads.") for name in {*own, *state}):
        return "a probe has a head for each --blr: pass those it was made with"
    for head in ("head.weight", "head.1.weight"):
        if head in own and head in state and len(own[head]) != len(state[head]):
            return f"its head has {len(state[head])} classes, --nb_classes is {len(own[head])}"
        if head in own and head not in state:
            return "it has no head: to start training from it pass it as --finetune"
    if ("fc_norm.weight" in state) != ("fc_norm.weight" in own):
        return f"it pools otherwise: pass --{'global_pool' if 'fc_norm.weight' in state else 'cls_token'}"
    return "--model, --patch_size and --input_size must be those it was made with"


def _pretrained_hint(checkpoint: dict, model: nn.Module, args: dict) -> str:
    """What about the file's encoder is not the model's, in words that name both."""
    state, config = checkpoint["model"], checkpoint.get("model_config") or {}
    theirs, ours = state.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if theirs is None or theirs.ndim != 4:
        return "it holds no Vision Transformer in names that are known here: the reference's, timm's, Hugging Face's"
    differ = []
    if theirs.shape[0] != ours.shape[0]:
        differ.append(f"its encoder is {theirs.shape[0]} wide, --model {args.get('model')} is {ours.shape[0]}")
    if theirs.shape[1] != ours.shape[1]:
        differ.append(f"it is for images of {theirs.shape[1]} channels, --in_chans is {ours.shape[1]}")
    if theirs.shape[2:] != ours.shape[2:]:
        differ.append(f"its patches are {theirs.shape[2]} pixels wide: pass --patch_size {theirs.shape[2]}")
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if blocks and len(blocks) != len(model.blocks):
        differ.append(f"it has {len(blocks)} blocks, --model {args.get('model')} has {len(model.blocks)}")
    if "fc_norm.weight" in state and "norm.weight" not in state and hasattr(model.norm, "weight"):
        differ.append("it pools the patches: pass --global_pool")
    made_with = config.get("model")
    return "; ".join(differ) or (f"it holds {made_with}" if made_with else "--model must be the one it was made with")


def _modules(keys: set[str]) -> list[str]:
    """The keys by their outermost module: blocks.* for every key of the blocks."""
    return sorted({name if "." not in name else name.split(".")[0] + ".*" for name in keys})

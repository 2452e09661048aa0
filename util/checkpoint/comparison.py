"""Compare a checkpoint's weights with a model, and say what does not fit, and which flag or file would."""

import re

import torch
from timm.layers import to_2tuple
from torch import nn

from util.checkpoint.configurations import known_config
from util.checkpoint.files import checkpoint_args
from util.checkpoint.formats import count_blocks, file_grid, has_decoder, is_square
from util.data.transforms import CentreCrop
from util.distributed import dist
from util.errors import UserError
from util.words import join_names

# Names of weights that are no part of an encoder: decoders, heads, the token for masked patches, and the heads of
# other self-supervised methods.
NO_ENCODER = re.compile(
    r"decoder|(mask_token|mask_embed|masked_embed|logit_scale|queue\w*)$|"
    r"(heads?|head_\w+|\w+_head|classifier|fc|pre_logits|attn_pool|projector|predictor|prototypes)\."
)
# Classification heads, by the name of a weight that each has: one layer, a probe's behind its BatchNorm, a sweep's.
HEADS = {
    "head.weight": "classifier (main_finetune.py)",
    "head.1.weight": "probe (main_linprobe.py)",
    "head.1.heads.0.weight": "probe (main_linprobe.py)",
}
# The properties by which describe_weights describes a model, and the flags that set them.
FLAGS = {
    "kind": "the script",
    "model": "--model",
    "encoder width": "--model",
    "encoder blocks": "--model",
    "attention heads": "--model",
    "channels": "--in_chans",
    "patch size": "--patch_size",
    "patches": "--input_size",
    "decoder width": "--decoder_dim",
    "decoder blocks": "--decoder_depth",
    "pooling": "--global_pool, --cls_token",
    "classes": "--nb_classes",
    "heads": "a head for each --blr",
}
NO_CLASS_TOKEN = "its encoder has no class token, which the models here need: use another file"  # for messages
# Parts of other encoders, by patterns of their weights' names.
FOREIGN_PARTS = {
    r"\bls[12]\b|gamma_?[12]\b|layer_?scale|lambda": "LayerScale",
    r"[qk]_norm": "norms of queries and keys",
    r"reg(ister)?_tokens?": "register tokens",
    r"dist\w*_token": "a distillation token",
    r"rel(ative)?_pos": "relative positions",
    r"rope|freqs": "rotary positions",
    r"mlp\.(w\d|fc1_[gx])|swiglu|weights_(in|out)": "gated MLPs",
    r"[qkv]_bias": "separate biases of queries and values",
    r"norm_pre|pre_norm": "a norm before the blocks",
}


def is_no_encoder(name: str) -> bool:
    """Return whether a weight of this name is known to be no part of an encoder."""
    return bool(NO_ENCODER.match(name))


def has_head(state: dict[str, torch.Tensor]) -> bool:
    """Return whether the weights include a classification head; those of self-supervised methods are none."""
    return count_classes(state) > 0


def count_classes(state: dict[str, torch.Tensor]) -> int:
    """Return the number of classes of the weights' classification head; 0: they have none."""
    return next((len(state[name]) for name in HEADS if name in state), 0)


def refuse_foreign_parts(source: str, surplus: set[str]) -> None:
    """Check that no weight of an encoder would be dropped.

    Args:
        source: Name of the checkpoint, for the message.
        surplus: Names of the file's weights that the model has no place for.

    Raises:
        UserError: Some of them belong to the encoder, which without them would compute something else.
    """
    dropped = sorted(name for name in surplus if not is_no_encoder(name))
    if dropped:
        raise UserError(f"{source} does not fit: {_describe_foreign_parts(dropped)}")


def _describe_foreign_parts(names: list[str]) -> str:
    """Return a phrase on the parts of other encoders that these weights belong to, or on the weights themselves."""
    parts = [part for pattern, part in FOREIGN_PARTS.items() if any(re.search(pattern, name) for name in names)]
    holds = f"{' and '.join(parts)} ({join_names(names, 3)})" if parts else join_names(names, 6)
    return (
        f"its encoder holds {holds}, which the models here lack, and without which it would compute something else. "
        "Use a plain Vision Transformer, such as MAE's, or this one in the library that it is from"
    )


def refuse_other_attention_heads(source: str, checkpoint: dict, model: nn.Module, args: dict) -> None:
    """Raise a UserError for other numbers of attention heads, on which the shapes of the weights do not depend."""
    config = known_config(checkpoint)
    for name, kind, flag in (
        ("num_heads", "attention heads", f"--model {args.get('model')}"),
        ("decoder_num_heads", "the decoder's attention heads", "--decoder_heads"),
    ):
        is_unused = name.startswith("decoder") and not has_decoder(checkpoint["model"])
        if name in model.config and not is_unused and config.get(name, model.config[name]) != model.config[name]:
            raise UserError(
                f"{source} does not fit: {kind}: {config[name]} in the file, {model.config[name]} here ({flag})"
            )


def refuse_other_grid(source: str, checkpoint: dict, model: nn.Module) -> None:
    """Raise a UserError for another grid of as many patches, whose positions have the same shape."""
    stored, here = file_grid(checkpoint), model.patch_embed.grid_size
    if stored and stored != here and stored[0] * stored[1] == here[0] * here[1]:
        size = known_config(checkpoint)["img_size"]
        raise UserError(
            f"{source} does not fit: it has {stored[0]} x {stored[1]} patches, here are {here[0]} x {here[1]}: pass "
            f"--input_size {' '.join(map(str, to_2tuple(size)))}"
        )


def _stored_values(checkpoint: dict) -> dict:
    """Return what a checkpoint tells about its model and its flags, by the flags' names."""
    return (checkpoint.get("model_config") or {}) | checkpoint_args(checkpoint)


def refuse_other_pooling(source: str, checkpoint: dict) -> None:
    """Raise a UserError for a classifier of timm's whose pooling the models here do not have."""
    pooling = (checkpoint.get("described") or {}).get("global_pool")
    here = "avg" if "fc_norm.weight" in checkpoint["model"] else "token"
    if pooling and pooling != here and has_head(checkpoint["model"]):
        raise UserError(
            f"{source} does not fit: it classifies by the pooling {pooling!r}, where a classifier with its final norm "
            f"pools by {here!r} here. Use it in timm, or fine-tune its encoder (--finetune)"
        )


def refuse_other_rates(source: str, checkpoint: dict, args: dict) -> None:
    """Raise a UserError if --blr differs from the rates of a sweep, which name its heads in the output."""
    stored, rates = checkpoint_args(checkpoint).get("blr"), args.get("blr")
    if isinstance(stored, list) and stored != rates and "probe" in args:  # fine-tuning is told that it is another job's
        raise UserError(f"{source} has the heads of --blr {' '.join(f'{rate:g}' for rate in stored)}: pass these")


def compare_flags(source: str, checkpoint: dict, args: dict, names: tuple[str, ...]) -> None:
    """Print a notice for each of these flags that differs from what the checkpoint was made with.

    Args:
        source: Name of the checkpoint.
        checkpoint: Its contents.
        args: The run's flags.
        names: Names of the flags to compare; those that either side does not have are skipped.
    """
    stored_args = _stored_values(checkpoint)
    for name in names:
        if name not in stored_args or name not in args:
            continue
        stored, current = stored_args[name], args[name]
        if name == "crop_pct":  # by default it depends on the input size
            stored, current = (CentreCrop(args["input_size"], share).cover for share in (stored, current))
        if comparable(stored) != comparable(current):
            default = "at its default"
            dist.print_rank0(
                f"notice: {source} was made with --{name} {stored_args[name] or default}, "
                f"here it is {args[name] or default}"
            )


def comparable(value: object) -> object:
    """Turn a tuple into a list, so that a flag's value equals the same value from a checkpoint."""
    return list(value) if isinstance(value, tuple) else value


def _image_size_problems(config: dict, model: nn.Module) -> list[str]:
    """Return a line on the sizes of images if a file's differs from the model's; at most one.

    Another size alone is no misfit, since positions are resized. It is shown to explain another patch size.
    """
    in_file, here = config.get("img_size"), model.config["img_size"]
    if in_file is None or in_file == here:
        return []
    return [f"image size: {in_file} in the file, {here} here (--input_size)"]


def _other_kind(model_state: dict, evaluation: bool) -> str:
    """Return what to do with an autoencoder where a classifier is needed, or the other way round."""
    if evaluation:
        return "it holds no classifier: train one first, with --finetune in main_finetune.py or main_linprobe.py"
    flag = "--init" if has_decoder(model_state) else "--finetune"
    return f"to start from its encoder, pass it as {flag}"


def warn_of_unknown_targets(source: str, checkpoint: dict, norm_pix_loss: bool) -> None:
    """Print a notice if neither an autoencoder's checkpoint nor a flag says whether its targets were normalised.

    Args:
        source: Name of the checkpoint.
        checkpoint: Its contents.
        norm_pix_loss: The user's flag.
    """
    if "norm_pix_loss" not in _stored_values(checkpoint) and not norm_pix_loss:
        dist.print_rank0(
            f"notice: {source} does not say whether its targets were normalised, and counts as trained on plain "
            "pixels; pass --norm_pix_loss with mae_pretrain_*_full.pth"
        )


def refuse_misfits(
    source: str, checkpoint: dict, model: nn.Module, args: dict, missing: set[str], surplus: set[str]
) -> None:
    """Check that a file's weights fit a model.

    Args:
        source: Name of the checkpoint.
        checkpoint: Its contents.
        model: The model to load them into.
        args: The run's flags.
        missing: Keys that the model needs and the file lacks.
        surplus: Keys of the file that the model has no place for.

    Raises:
        UserError: Keys are missing or surplus, or shapes differ; it describes file and model side by side.
    """
    # Keys that both sides have may still differ in kind and in shape.
    state, model_state = checkpoint["model"], model.state_dict()
    refuse_other_kinds(source, state, model)
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(model_state[name].shape)} in the model"
        for name in model_state
        if name in state and state[name].shape != model_state[name].shape
    ]
    if not missing and not surplus and not shapes:
        return

    # List the properties that differ first, since they name a flag, then the weights.
    config = checkpoint.get("model_config") or {}
    in_file = describe_weights(state, {"model": args.get("model"), **config})
    in_model = describe_weights(model_state, {**model.config, "model": args.get("model")})
    problems = [
        f"{name}: {in_file[name]} in the file, {in_model[name]} here ({FLAGS[name]})"
        for name in in_file
        if name in in_model and in_file[name] != in_model[name]
    ]
    if in_file.get("patch size") != in_model.get("patch size"):
        problems += _image_size_problems(config, model)
    if "rows of positions" in in_file:
        rows = model_state["pos_embed"].shape[1]
        problems.append(f"rows of positions: {in_file['rows of positions']} in the file, {rows} here")
    problems += [f"the file lacks {join_names(sorted(missing), 6)}"] if missing else []
    problems += [f"the model has no {join_names(sorted(surplus), 6)}"] if surplus else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])

    remedy = _remedy(state, model_state, missing, surplus)
    if "kind" in in_file and in_file["kind"] != in_model["kind"]:
        remedy = _other_kind(model_state, bool(args.get("eval")))
    raise UserError("\n  ".join([f"{source} does not fit: {remedy}", *problems]))


def _remedy(state: dict, model_state: dict, missing: set[str], surplus: set[str]) -> str:
    """Return what to do about weights that do not fit, as far as their names tell.

    Args:
        state: The file's weights.
        model_state: The model's.
        missing: Names that the file lacks.
        surplus: Names that the model has no place for.
    """
    if "patch_embed.proj.weight" not in state:
        return (
            "it holds no Vision Transformer in names that are known here: facebookresearch/mae's, timm's, "
            "Hugging Face's"
        )
    if "cls_token" in missing:
        return NO_CLASS_TOKEN

    # Other flags can explain surplus weights of a decoder, a head, the other norm or further blocks. Any other surplus
    # weight belongs to an encoder of another architecture.
    foreign = [
        name
        for name in sorted(surplus)
        if re.sub(r"blocks\.\d+\.", "blocks.0.", name) not in model_state
        and not is_no_encoder(name)
        and not name.startswith(("norm.", "fc_norm."))
    ]
    return (
        _describe_foreign_parts(foreign) if foreign else "pass the flags that the file was made with, or another file"
    )


def refuse_other_kinds(source: str, state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Check that a file's weights are plain floating-point numbers where the model's are.

    Args:
        source: Name of the checkpoint, for the message.
        state: Its weights; those that the model does not have are not checked.
        model: The model to load them into.

    Raises:
        UserError: Some are whole numbers, sparse, quantised, or not stored in the file.
    """
    kinds = [
        f"{name} is of type {str(state[name].dtype).removeprefix('torch.')}, layout {state[name].layout}"
        for name, value in model.state_dict().items()
        if name in state and value.is_floating_point() and not _is_plain(state[name])
    ]
    if kinds:
        raise UserError(
            f"{source} does not fit: its weights are no plain floating-point numbers, {join_names(kinds, 2)}: save "
            "them as such in the program that they are from"
        )


def _is_plain(value: torch.Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers, one for each element, in this process's memory."""
    is_stored = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
    return is_stored and value.is_floating_point() and not hasattr(value, "full_tensor")


def describe_weights(state: dict[str, torch.Tensor], config: dict) -> dict[str, object]:
    """Describe a model by its weights: return the values of those keys of FLAGS that are known.

    Args:
        state: The weights; {} is returned if they are not a Vision Transformer's.
        config: The model's name and number of attention heads, which the weights do not show, where known.
    """
    if "patch_embed.proj.weight" not in state or state["patch_embed.proj.weight"].ndim != 4:
        return {}
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    properties = {
        "model": config.get("model"),
        "encoder width": width,
        "encoder blocks": count_blocks(state),
        "attention heads": config.get("num_heads"),
        "channels": channels,
        "patch size": patch[0] if len(set(patch)) == 1 else tuple(patch),
        **_describe_positions(state, config),
        **_describe_head(state),
    }
    return {name: value for name, value in properties.items() if value is not None}


def _describe_positions(state: dict[str, torch.Tensor], config: dict) -> dict[str, object]:
    """Return the number of patches; if the grid is unknown, and not square, the number of rows of positions."""
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return {}
    patches = state["pos_embed"].shape[1] - 1
    if "img_size" in config or is_square(patches):
        return {"patches": patches}
    return {"rows of positions": patches + 1}


def _describe_head(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return the properties of FLAGS that show what follows the encoder: a decoder, a classifier's head, or nothing."""
    if has_decoder(state):
        width, depth = state["decoder_pred.weight"].shape[-1], count_blocks(state, "decoder_blocks.")
        return {"kind": "autoencoder (main_pretrain.py)", "decoder width": width, "decoder blocks": depth}
    pooling = "mean of the patches" if "fc_norm.weight" in state else "class token"
    heads = [name for name in state if re.fullmatch(r"head\.1\.heads\.\d+\.weight", name)]
    for name, kind in HEADS.items():
        if name in state:
            return {"kind": kind, "pooling": pooling, "classes": len(state[name]), "heads": max(1, len(heads))}
    return {"kind": "encoder, without head or decoder"}

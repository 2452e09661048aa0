"""Loading of a checkpoint's weights into a model, whole or the encoder alone, with a comparison where they misfit."""

import re

import torch
from timm.layers import to_2tuple
from torch import nn

from util.checkpoint.files import checkpoint_args, load_checkpoint
from util.checkpoint.formats import describe
from util.data.datasets import class_differences
from util.data.listing import join_names
from util.data.transforms import CentreCrop
from util.distributed import dist
from util.errors import UserError
from util.pos_embed import resize_pos_embed

# Names of weights that are no part of an encoder: decoders, heads, the token for masked patches, and the heads of
# other self-supervised methods.
NO_ENCODER = re.compile(
    r"decoder|mask_token$|(head|heads|head_\w+|classifier|fc|pre_logits|attn_pool|projector|predictor|prototypes)\."
)
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


def load_model(
    source: str, checkpoint: dict, model: nn.Module, args: dict, class_to_idx: dict[str, int] | None = None
) -> None:
    """Load all weights of a checkpoint into a model of the same kind.

    Args:
        source: Name of the checkpoint, for the messages.
        checkpoint: Its contents.
        model: The model to load them into.
        args: The run's flags, for the messages.
        class_to_idx: The classes of the run's images; None: not compared.

    Raises:
        UserError: A weight is missing, surplus or of another shape, or the classes differ.
    """
    _refuse_other_classes(source, checkpoint.get("class_to_idx"), class_to_idx)
    state, model_state = checkpoint["model"], model.state_dict()
    missing, surplus = set(model_state) - set(state), set(state) - set(model_state)
    _refuse_misfits(source, checkpoint, model, args, missing, surplus)
    _refuse_other_heads(source, checkpoint, model, args)
    model.load_state_dict(state)


def _refuse_other_classes(source: str, stored: dict[str, int] | None, current: dict[str, int] | None) -> None:
    """Raise a UserError where both are known and differ: the head would name the wrong classes."""
    if not stored or not current or stored == current:
        return
    absent = sorted(set(stored) - set(current))
    if absent and set(current) < set(stored):
        raise UserError(
            f"{len(current)} of the {len(stored)} classes that {source} was trained on have a folder in --data_path, "
            f"and all must have one: make the others, which may be empty: {join_names(absent)}"
        )
    differences = class_differences(list(stored), list(current), source, "--data_path")
    raise UserError(
        f"{source} was trained on other classes, and would name the wrong ones. "
        f"{differences or 'their order differs'}. Pass the --data_path that it was trained on"
    )


def load_for_eval(source: str, model: nn.Module, args: dict, class_to_idx: dict[str, int]) -> None:
    """Load the weights to evaluate, or their EMA with args["model_ema"].

    Args:
        source: File, folder or address of the checkpoint; "": --resume auto found none.
        model: The classifier to load them into.
        args: The run's flags.
        class_to_idx: The classes of the run's images.

    Raises:
        UserError: There is no checkpoint, or it does not fit the model or the classes.
    """
    if not source:
        raise UserError(
            f"--eval --resume auto: no checkpoint in {args['output_dir']} to evaluate. Pass its path as --resume"
        )
    checkpoint = load_checkpoint(source, ema=args.get("model_ema", False))
    load_model(source, checkpoint, model, args, class_to_idx)

    # Released files name no classes: by convention their numbers are those of the sorted folders.
    classes = model.config["num_classes"]
    if not checkpoint.get("class_to_idx"):
        if len(class_to_idx) != classes:
            raise UserError(
                f"--data_path has {len(class_to_idx)} class folders in val/, and {source} has {classes} classes "
                f"without names: class k is taken to be the k-th folder, so that there must be {classes}, some of "
                "which may be empty"
            )
        dist.print_rank0(f"notice: {source} names no classes: class k is taken to be the k-th folder of val/, sorted")
    _compare_preprocessing(source, checkpoint, args, ("mean", "std", "crop_pct", "exif"))
    dist.print_rank0(f"weights from {source}")


def load_pretrained(source: str, model: nn.Module, args: dict | None = None) -> tuple[set[str], set[str]]:
    """Load a pre-trained encoder into a classifier, before its head is prepared for training (paper, A.1).

    The weights that only the classifier has must be the head's, attn_pool's or fc_norm's. Those that only the file has
    must be no part of an encoder (a head is never loaded), or the norm's of the other pooling. Positions are resized to
    the model's grid.

    Args:
        source: File, folder or address of the checkpoint.
        model: The classifier.
        args: The run's flags, for the messages.

    Returns:
        The names of the model's weights that were not loaded, the head's always among them, and of the file's weights
        that were not used; the modules of both are printed, too.

    Raises:
        UserError: The source can't be read, any other weight is missing or surplus, or shapes or the number of
            attention heads differ; the message names them.
    """
    args = args or {}
    checkpoint, model_state = load_checkpoint(source), model.state_dict()

    # A head in the file is for other classes, and left out.
    state = {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}
    unused = {name for name in checkpoint["model"] if name.startswith("head.")} | set(checkpoint.get("left_out", ()))

    _refuse_other_heads(source, checkpoint, model, args)
    resize_positions(state, checkpoint, model)

    # The weights that may be missing, and those that may be surplus.
    missing, surplus = set(model_state) - set(state), set(state) - set(model_state)
    head = {name for name in model_state if name.startswith(("head.", "attn_pool.", "fc_norm."))}
    decoder = {name for name in surplus if NO_ENCODER.match(name)}
    needless = decoder | (surplus & other_norm(state))

    # For a comparison that shows true differences only, describe the file as if it had the model's head, and without
    # a model's name: an autoencoder's is never a classifier's.
    encoder = {name: value for name, value in state.items() if name not in decoder}
    encoder |= {name: model_state[name] for name in head if "norm.weight" in state or not name.startswith("fc_norm.")}
    config = {**(checkpoint.get("model_config") or {}), "model": None}
    comparison = {**checkpoint, "model": encoder, "model_config": config}
    _refuse_misfits(source, comparison, model, args, missing - head, surplus - needless)
    _compare_preprocessing(source, checkpoint, args, ("mean", "std"))

    # Everything is known to fit: load, and print the weights that were not matched.
    model.load_state_dict(state, strict=False)
    surplus |= unused
    new, dropped = (", ".join(_modules(keys)) or "nothing" for keys in (missing, surplus))
    dist.print_rank0(
        f"encoder from {source} ({describe(checkpoint)}); new here: {new}; in the file but not used: {dropped}"
    )
    return missing, surplus


def load_initial(source: str, model: nn.Module, args: dict) -> None:
    """Load an encoder, with its decoder where the file has one, into an autoencoder from which a pre-training starts.

    The encoder must be whole but for `norm`, which files of classifiers that average patches lack, and which then is
    new. A decoder must be whole, too, and of the model's sizes. Positions of both are resized to the model's grid.

    Args:
        source: File, folder or address of the checkpoint.
        model: The autoencoder.
        args: The run's flags, for the messages.

    Raises:
        UserError: The source can't be read, or a weight of the encoder, or of its decoder, is missing, surplus or of
            another shape.
    """
    checkpoint, model_state = load_checkpoint(source), model.state_dict()
    state = {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}
    _refuse_other_heads(source, checkpoint, model, args)
    resize_positions(state, checkpoint, model)

    # Without a decoder in the file the model keeps its own. The file is compared as if it had what it need not have.
    decoder = {name for name in model_state if name.startswith("decoder_") or name == "mask_token"}
    new = decoder if "decoder_pred.weight" not in state else set()
    if "fc_norm.weight" in state and "norm.weight" not in state:
        new |= {"norm.weight", "norm.bias"}
    state = {name: value for name, value in state.items() if name not in new}
    needless = {name for name in set(state) - set(model_state) if NO_ENCODER.match(name) or name.startswith("fc_norm.")}
    state = {name: value for name, value in state.items() if name not in needless}
    config = {name: value for name, value in (checkpoint.get("model_config") or {}).items() if name != "model"}
    comparison = {**checkpoint, "model": state | {name: model_state[name] for name in new}, "model_config": config}
    missing, surplus = set(model_state) - set(state) - new, set(state) - set(model_state)
    _refuse_misfits(source, comparison, model, args, missing, surplus)

    # A decoder that predicts normalised patches, or does not, goes on from another loss than the run's.
    _compare_preprocessing(source, checkpoint, args, ("mean", "std"))
    normalised = config.get("norm_pix_loss", checkpoint_args(checkpoint).get("norm_pix_loss"))
    if not new & decoder and normalised is not None and bool(normalised) != bool(args.get("norm_pix_loss")):
        dist.print_rank0(
            f"notice: the decoder of {source} was trained with{'' if normalised else 'out'} --norm_pix_loss, this run "
            f"is with{'out' if normalised else ''} it"
        )

    model.load_state_dict(state, strict=False)
    unused = (set(checkpoint["model"]) - set(state) - new) | set(checkpoint.get("left_out", ()))
    parts_new, parts_unused = (", ".join(_modules(names)) or "nothing" for names in (new, unused))
    dist.print_rank0(
        f"starting from {source} ({describe(checkpoint)}); new here: {parts_new}; in the file but not used: "
        f"{parts_unused}"
    )


def other_norm(state: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the norm that an encoder with the other pooling would use: never more than one is needed."""
    names = {name for name in state if name.startswith("norm.")}
    return names | {name for name in state if name.startswith("fc_norm.") and names}


def refuse_foreign_parts(source: str, surplus: set[str]) -> None:
    """Check that no weight of an encoder would be dropped.

    Args:
        source: Name of the checkpoint, for the message.
        surplus: Names of the file's weights that the model has no place for.

    Raises:
        UserError: Some of them belong to the encoder, which without them would compute something else.
    """
    dropped = sorted(name for name in surplus if not NO_ENCODER.match(name))
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


def _refuse_other_heads(source: str, checkpoint: dict, model: nn.Module, args: dict) -> None:
    """Raise a UserError for other numbers of attention heads, on which the shapes of the weights do not depend."""
    config = checkpoint.get("model_config") or {}
    for name, kind, flag in (
        ("num_heads", "attention heads", f"--model {args.get('model')}"),
        ("decoder_num_heads", "the decoder's attention heads", "--decoder_heads"),
    ):
        if name in model.config and config.get(name, model.config[name]) != model.config[name]:
            raise UserError(
                f"{source} does not fit: {kind}: {config[name]} in the file, {model.config[name]} here ({flag})"
            )


def resize_positions(state: dict[str, torch.Tensor], checkpoint: dict, model: nn.Module) -> None:
    """Resize the positions in a state dict, in place, to the model's grid where they were made for another.

    Args:
        state: The weights to load; pos_embed, and the decoder's where the model has one, are [1, 1 + patches, D].
        checkpoint: The checkpoint that they are from; its "model_config" gives image and patch size, hence the
            grid; without them it is taken as square. Positions that do not fill that grid are left as they are.
        model: The model with the new grid.
    """
    if "pos_embed" in state and not state["pos_embed"].any():
        dist.print_rank0("warning: the file's positions are all zero, so its model cannot tell where a patch was")
    config, grid = checkpoint.get("model_config") or {}, model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in state or not hasattr(model, name) or state[name].ndim != 3:
            continue

        # A file that does not tell its grid has a square one, as the released files do.
        patches = state[name].shape[1] - 1
        side = round(patches**0.5)
        old = (side, side)
        if "img_size" in config:
            old = tuple(length // config["patch_size"] for length in to_2tuple(config["img_size"]))
        if patches == old[0] * old[1] and old != grid:
            state[name] = resize_pos_embed(state[name], old, grid)
            kind = "positions" if name == "pos_embed" else "the decoder's positions"
            dist.print_rank0(f"{kind} resized from {old[0]} x {old[1]} to {grid[0]} x {grid[1]}")


def _compare_preprocessing(source: str, checkpoint: dict, args: dict, names: tuple[str, ...]) -> None:
    """Print a notice for each of these flags that prepares images differently than in the checkpoint's run.

    Args:
        source: Name of the checkpoint.
        checkpoint: Its contents.
        args: The run's flags.
        names: Names of the flags to compare; those that either side does not have are skipped.
    """
    stored_args = checkpoint_args(checkpoint)
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


def _refuse_misfits(
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
    # Keys that both sides have may still differ in shape.
    state, model_state = checkpoint["model"], model.state_dict()
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
    if "rows of positions" in in_file:
        rows = model_state["pos_embed"].shape[1]
        problems.append(f"rows of positions: {in_file['rows of positions']} in the file, {rows} here")
    problems += [f"the file lacks {join_names(sorted(missing), 6)}"] if missing else []
    problems += [f"the model has no {join_names(sorted(surplus), 6)}"] if surplus else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])

    # The remedy depends on the kind of file.
    remedy = "pass the flags that the file was made with, or another file"
    foreign = sorted(name for name in surplus if not NO_ENCODER.match(name))
    if any(re.search(pattern, name) for pattern in FOREIGN_PARTS for name in foreign):
        remedy = _describe_foreign_parts(foreign)
    if "cls_token" in missing and "patch_embed.proj.weight" in state:
        remedy = "its encoder has no class token, which the models here need: use another file"
    if "kind" in in_file and in_file["kind"] != in_model["kind"]:
        remedy = "to start a fine-tuning or a probe from its encoder, pass it as --finetune"
    if "patch_embed.proj.weight" not in state:
        remedy = "it holds no Vision Transformer in names that are known here: the reference's, timm's, Hugging Face's"
    raise UserError("\n  ".join([f"{source} does not fit: {remedy}", *problems]))


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
        "encoder blocks": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "attention heads": config.get("num_heads"),
        "channels": channels,
        "patch size": patch[0] if len(set(patch)) == 1 else tuple(patch),
        **_describe_positions(state, config),
        **_describe_head(state),
    }
    return {name: value for name, value in properties.items() if value is not None}


def _describe_positions(state: dict[str, torch.Tensor], config: dict) -> dict[str, object]:
    """Return the number of patches, or of rows of positions where that can't be one more than a square grid has."""
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return {}
    patches = state["pos_embed"].shape[1] - 1
    if "img_size" in config or round(patches**0.5) ** 2 == patches:
        return {"patches": patches}
    return {"rows of positions": patches + 1}


def _describe_head(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return the properties of FLAGS that show what follows the encoder: a decoder, a classifier's head, or nothing."""
    if "decoder_pred.weight" in state:
        blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
        width = state["decoder_pred.weight"].shape[-1]
        return {"kind": "autoencoder (main_pretrain.py)", "decoder width": width, "decoder blocks": len(blocks)}
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
    """Shorten keys to their outermost modules, sorted: all those in blocks become one "blocks.*"; "cls_token" stays."""
    return sorted({name if "." not in name else name.split(".")[0] + ".*" for name in keys})

"""Loading of a checkpoint's weights into a model: whole, the encoder alone, or the encoder with its decoder."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from util.checkpoint import classes, comparison
from util.checkpoint.files import load_checkpoint
from util.checkpoint.formats import add_class_position, describe, file_grid, has_decoder
from util.distributed import dist
from util.errors import UserError
from util.pos_embed import resize_pos_embed


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
    classes.refuse_other_classes(source, checkpoint.get("class_to_idx"), class_to_idx)
    checkpoint["model"] = add_class_position(checkpoint, source, model.patch_embed.num_patches)
    state, model_state = checkpoint["model"], model.state_dict()
    missing, surplus = set(model_state) - set(state), set(state) - set(model_state)
    comparison.refuse_misfits(source, checkpoint, model, args, missing, surplus)
    comparison.refuse_other_attention_heads(source, checkpoint, model, args)
    comparison.refuse_other_grid(source, checkpoint, model)
    model.load_state_dict(state)


def load_exactly(model: nn.Module, state: dict[str, Tensor], source: str, kind: str, remedy: str) -> None:
    """Load weights into a model that was built after their file's description.

    Args:
        model: The model.
        state: The weights, by name.
        source: Name of their file, for the message.
        kind: What the model is, for the message.
        remedy: What to use instead, as a sentence without its full stop.

    Raises:
        UserError: Weights are missing, surplus, of another shape, or no plain floating-point numbers.
    """
    comparison.refuse_other_kinds(source, state, model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first_mismatch = str(error).splitlines()[1].strip().rstrip(".")
        raise UserError(f"{source} holds no {kind} that can be built here: {first_mismatch}. {remedy}") from error


def load_for_eval(
    source: str, model: nn.Module, args: dict, folders: list[str], class_names: list[str] | None = None
) -> list[int]:
    """Load the weights to evaluate, or their EMA with args["model_ema"].

    Args:
        source: File, folder or address of the checkpoint; "": --resume auto found none.
        model: The classifier to load them into.
        args: The run's flags.
        folders: Class folders of the run's images: all the classes of the checkpoint, or some of them.
        class_names: Names of the checkpoint's classes, in their order; None: those that it stores.

    Returns:
        The class number, in the checkpoint, of each folder.

    Raises:
        UserError: There is no checkpoint, or it does not fit the model or the folders.
    """
    if not source:
        raise UserError(
            f"--eval --resume auto: no checkpoint in {args['output_dir']} to evaluate. Pass its path as --resume"
        )
    checkpoint = load_checkpoint(source, ema=args.get("model_ema", False))
    comparison.refuse_other_pooling(source, checkpoint)
    comparison.refuse_other_rates(source, checkpoint, args)
    load_model(source, checkpoint, model, args)
    names = classes.resolve_class_names(source, checkpoint, model.config["num_classes"], class_names)
    numbers = classes.match_classes(source, names, folders, model.config["num_classes"])
    comparison.compare_flags(source, checkpoint, args, ("mean", "std", "crop_pct", "exif", "val_fraction", "val_seed"))
    dist.print_rank0(f"weights from {source}")
    return numbers


def load_pretrained(
    source: str, model: nn.Module, args: dict | None = None, checkpoint: dict | None = None
) -> tuple[set[str], set[str]]:
    """Load a pre-trained encoder into a classifier, before its head is prepared for training (paper, A.1).

    A weight that only the classifier has must belong to its head or to `fc_norm`. One that only the file has must lie
    outside the encoder (in a decoder or a head, which are not loaded), or belong to the norm of the other pooling.
    Positions are resized to the model's grid.

    Args:
        source: File, folder or address of the checkpoint.
        model: The classifier.
        args: The run's flags, for the messages.
        checkpoint: The contents of the source, if they are read already.

    Returns:
        The names of the model's weights that were not loaded, the head's always among them, and of the file's weights
        that were not used; the modules of both are printed, too.

    Raises:
        UserError: The source can't be read, any other weight is missing or surplus, or shapes or the number of
            attention heads differ; the message names them.
    """
    args, checkpoint = args or {}, checkpoint or load_checkpoint(source)
    state = _encoder_state(source, checkpoint, model, args)
    resized = _resize_positions(state, checkpoint, model)
    model_state = model.state_dict()
    unused = {name for name in checkpoint["model"] if name.startswith("head.")} | set(checkpoint["left_out"])

    # The weights that may be missing, and those that may be surplus.
    missing, surplus = set(model_state) - set(state), set(state) - set(model_state)
    head = {name for name in model_state if name.startswith(("head.", "fc_norm."))}
    decoder = {name for name in surplus if comparison.is_no_encoder(name)}
    needless = decoder | (surplus & unneeded_norms(state))

    # For a comparison that shows true differences only, describe the file as if it had the model's head, and an
    # autoencoder by the name of the classifier that has its encoder.
    encoder = {name: value for name, value in state.items() if name not in decoder}
    encoder |= {name: model_state[name] for name in head if "norm.weight" in state or not name.startswith("fc_norm.")}
    compared = _renamed(checkpoint, encoder, lambda name: re.sub(r"^mae_|_dec\w+$", "", name))
    comparison.refuse_misfits(source, compared, model, args, missing - head, surplus - needless)
    comparison.compare_flags(source, checkpoint, args, ("mean", "std", "exif"))

    # Everything is known to fit: load, and print what was changed, and the weights that were not matched.
    model.load_state_dict(state, strict=False)
    for line in resized:
        dist.print_rank0(line)
    surplus |= unused
    dist.print_rank0(f"encoder from {source} ({describe(checkpoint)}); {_describe_unmatched(missing, surplus)}")
    return missing, surplus


def load_initial(source: str, model: nn.Module, args: dict) -> None:
    """Load an encoder, with its decoder where the file has one, into an autoencoder from which a pre-training starts.

    The encoder must be whole, except for `norm`, which files of classifiers that average patches lack, and which is new
    then. A decoder must be whole, too, and of the model's sizes. Positions of both are resized to the model's grid.

    Args:
        source: File, folder or address of the checkpoint.
        model: The autoencoder.
        args: The run's flags, for the messages.

    Raises:
        UserError: The source can't be read, or a weight of the encoder, or of its decoder, is missing, surplus or of
            another shape.
    """
    checkpoint = load_checkpoint(source)
    state = _encoder_state(source, checkpoint, model, args)
    resized = _resize_positions(state, checkpoint, model)
    model_state = model.state_dict()

    # Weights that the file need not have: a decoder, and the norm that an average of patches makes needless.
    decoder = {name for name in model_state if name.startswith("decoder_") or name == "mask_token"}
    new = set() if has_decoder(state) else decoder
    if "fc_norm.weight" in state and "norm.weight" not in state:
        new |= {"norm.weight", "norm.bias"}

    # Weights of the file that are left there: those of heads and other decoders, and of the other norm.
    needless = {
        name for name in set(state) - set(model_state) if comparison.is_no_encoder(name) or name.startswith("fc_norm.")
    }
    if has_decoder(state):
        needless = {name for name in needless if not name.startswith("decoder_")}
    state = {name: value for name, value in state.items() if name not in needless | new}

    # The file is compared as if it had what it need not have; a classifier, by the name of its autoencoder.
    whole = state | {name: model_state[name] for name in new}
    compared = _renamed(checkpoint, whole, lambda name: "mae_" + name.removeprefix("mae_"))
    missing, surplus = set(model_state) - set(state) - new, set(state) - set(model_state)
    comparison.refuse_misfits(source, compared, model, args, missing, surplus)

    # A decoder that was trained with another --norm_pix_loss predicts other targets, and a file may not tell: notices.
    comparison.compare_flags(source, checkpoint, args, ("mean", "std", "exif"))
    if has_decoder(state):
        comparison.compare_flags(source, checkpoint, args, ("norm_pix_loss",))
        comparison.warn_of_unknown_targets(source, checkpoint, args.get("norm_pix_loss", False))

    model.load_state_dict(state, strict=False)
    for line in resized:
        dist.print_rank0(line)
    unused = (set(checkpoint["model"]) - set(state) - new) | set(checkpoint["left_out"])
    dist.print_rank0(f"starting from {source} ({describe(checkpoint)}); {_describe_unmatched(new, unused)}")


def _renamed(checkpoint: dict, state: dict[str, Tensor], rename: Callable[[str], str]) -> dict:
    """Return a checkpoint for a comparison: with other weights, and its model under another name if it has one."""
    config = dict(checkpoint.get("model_config") or {})
    if config.get("model"):
        config["model"] = rename(config["model"])
    return {**checkpoint, "model": state, "model_config": config}


def _encoder_state(source: str, checkpoint: dict, model: nn.Module, args: dict) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint to start a training from, without a head, which is for other classes.

    Args:
        source: Name of the checkpoint, for the messages.
        checkpoint: Its contents, in which the class token gets a position if it has none.
        model: The model that is to be trained.
        args: The run's flags, for the messages.

    Raises:
        UserError: The checkpoint was made with another number of attention heads.
    """
    checkpoint["model"] = add_class_position(checkpoint, source, model.patch_embed.num_patches)
    comparison.refuse_other_attention_heads(source, checkpoint, model, args)
    return {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}


def _describe_unmatched(new: set[str], unused: set[str]) -> str:
    """Return a phrase on the model's weights that are not the file's, and on the file's that are not used."""
    parts_new, parts_unused = (", ".join(_modules(names)) or "nothing" for names in (new, unused))
    return f"new here: {parts_new}; in the file but not used: {parts_unused}"


def unneeded_norms(state: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of those final norms in a state dict that a model may leave unused.

    A model uses one of them, according to its pooling: `norm` for the class token, `fc_norm` for the mean of the
    patches. The names of `fc_norm` are returned only if `norm` is there as well.
    """
    names = {name for name in state if name.startswith("norm.")}
    return names | {name for name in state if name.startswith("fc_norm.") and names}


def _resize_positions(state: dict[str, torch.Tensor], checkpoint: dict, model: nn.Module) -> list[str]:
    """Resize the positions in a state dict, in place, to the model's grid where they were made for another.

    Args:
        state: The weights to load; pos_embed, and the decoder's where the model has one, are [1, 1 + patches, D].
        checkpoint: The checkpoint that they are from; its "model_config" gives image and patch size, hence the
            grid; without them it is taken as square. Positions that do not fill that grid are left as they are.
        model: The model with the new grid.

    Returns:
        Lines to print when the weights are loaded: what was resized, and a warning about positions that are all zero.
    """
    lines = []
    if "pos_embed" in state and not state["pos_embed"].any():
        lines.append("warning: the file's positions are all zero, so its model cannot tell where a patch was")
    grid = model.patch_embed.grid_size
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in state or not hasattr(model, name) or state[name].ndim != 3:
            continue

        # A file that does not tell its grid has a square one, as the released files do.
        patches = state[name].shape[1] - 1
        side = round(patches**0.5)
        old = file_grid(checkpoint) or (side, side)
        if patches == old[0] * old[1] and old != grid:
            state[name] = resize_pos_embed(state[name], old, grid)
            kind = "positions" if name == "pos_embed" else "the decoder's positions"
            here = "images of {} x {} pixels".format(*model.patch_embed.img_size)
            lines.append(f"{kind} resized from {old[0]} x {old[1]} to {grid[0]} x {grid[1]} patches, for {here}")
    return lines


def _modules(keys: set[str]) -> list[str]:
    """Shorten keys to their outermost modules, sorted: all those in blocks become one "blocks.*"; "cls_token" stays."""
    return sorted({name if "." not in name else name.split(".")[0] + ".*" for name in keys})

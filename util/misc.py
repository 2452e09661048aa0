"""Checkpoints: what is in them, how they are written, and how they come back.

checkpoint-{epoch}.pth holds, all of it plain types and tensors (torch.load with weights_only=True opens it):
    model         parameters and buffers, under the names of the released weights
    model_config  the model's name and the arguments that build it
    optimizer, scaler, epoch (the last one completed), args (a dict)
    class_to_idx  classifiers only
"""

import argparse
import hashlib
import os
import pickle
import re
import urllib.error
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from util import dist
from util.amp import LossScaler
from util.errors import UserError
from util.pos_embed import resize_pos_embed


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def save_checkpoint(
    output_dir: str,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler,
    args: dict,
    class_to_idx: dict[str, int] | None = None,
) -> None:
    """Write output_dir/checkpoint-{epoch}.pth from rank 0; a file of that name is replaced only once the new one is
    whole. `args` are the run's flags, args["model"] its model's name. Without output_dir nothing is written."""
    if not output_dir or dist.rank() != 0:
        return
    model = dist.unwrap(model)
    state = {
        "model": model.state_dict(),
        "model_config": {"model": args["model"], **model.config},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "args": args,
    }
    if class_to_idx is not None:
        state["class_to_idx"] = class_to_idx
    path = Path(output_dir) / f"checkpoint-{epoch}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(source: str) -> dict:
    """Read a checkpoint from a file or an http(s) address, on the CPU, without running any code that is in it.

    The reference's checkpoints hold an argparse.Namespace: that one class is allowed. A bare state dict comes back
    as {"model": ...}. Raises UserError, naming the source, for a file that is missing, broken, refused or not a
    checkpoint.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            checkpoint = _download(source) if is_url(source) else torch.load(source, "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it holds {found[1]}" if found else "it is not made of plain types and tensors"
            raise UserError(f"{source} is refused: {what}, and loading it could run code. Nothing was run.") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise UserError(f"cannot download {source}: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror or error}") from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{source} is not a whole PyTorch checkpoint: {what}") from error
    if isinstance(checkpoint, dict) and "model" not in checkpoint and _is_state_dict(checkpoint):
        checkpoint = {"model": checkpoint}
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise UserError(f"{source} is not a checkpoint: it has no 'model' with named tensors")
    return checkpoint


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _download(url: str) -> dict:
    """torch.hub's cache goes by file name alone; a digest of the whole address keeps two that end alike apart."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}"

    def load() -> dict:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=dist.rank() == 0, file_name=name, weights_only=True
        )

    # One download for all ranks; its failure is every rank's, so the barrier comes in any case.
    try:
        checkpoint = load() if dist.rank() == 0 else None
    finally:
        dist.barrier()
    return load() if checkpoint is None else checkpoint


def _names(keys: set[str]) -> str:
    shown = sorted(keys)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _modules(keys: set[str]) -> list[str]:
    """The keys by their outermost module: blocks.* for every key of the blocks."""
    return sorted({name if "." not in name else name.split(".")[0] + ".*" for name in keys})


def _complain(source: str, model: nn.Module, state: dict[str, Tensor], missing: set[str], surplus: set[str]) -> None:
    """Raise UserError if keys are missing or surplus, or shapes differ, naming both sides."""
    own = model.state_dict()
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [f"the file lacks {_names(missing)}"] if missing else []
    problems += [f"the model has no {_names(surplus)}"] if surplus else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source} does not fit --model, --patch_size, --input_size or --nb_classes:\n  {lines}")


def resume(
    source: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: LossScaler | None = None,
    start_epoch: int = 0,
) -> int:
    """Load the model (every key must match) and, given an optimiser, the run's state; returns the epoch to go on
    with: start_epoch without a source ("") and for a file of weights alone. Raises UserError where the file does not
    fit the model or the optimiser."""
    if not source:
        return start_epoch
    checkpoint = load_checkpoint(source)
    state, own = checkpoint["model"], model.state_dict()
    _complain(source, model, state, set(own) - set(state), set(state) - set(own))
    model.load_state_dict(state)
    if optimizer is None or "optimizer" not in checkpoint or "epoch" not in checkpoint:
        dist.say(f"weights from {source}")
        return start_epoch
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"the optimiser state in {source} belongs to another job or model: {error}") from error
    if scaler is not None:
        scaler.load_state_dict(checkpoint.get("scaler") or {})
    dist.say(f"resuming from {source}, after epoch {checkpoint['epoch']}")
    return checkpoint["epoch"] + 1


def load_pretrained(source: str, model: nn.Module, global_pool: bool) -> tuple[set[str], set[str]]:
    """Put a pre-trained encoder into a classifier, before its head is made ready for training (paper, A.1).

    What the classifier has and the file lacks must be the head (and fc_norm when pooling); what the file has beyond
    it must be the decoder's (and norm when pooling). Positions are resized to the model's grid. Prints and
    returns the names that are new and those that were not used; raises UserError, naming the keys, for anything else.
    """
    state, own = dict(load_checkpoint(source)["model"]), set(model.state_dict())
    head = {name for name in own if name.startswith("head.") or (global_pool and name.startswith("fc_norm."))}
    left_out = {
        name
        for name in set(state) - own
        if name.startswith("decoder_") or name == "mask_token" or (global_pool and name in ("norm.weight", "norm.bias"))
    }
    if "pos_embed" in state:
        grid = model.patch_embed.grid_size
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        if state["pos_embed"].shape[1] == 1 + side * side and (side, side) != grid:
            state["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side), grid)
            dist.say(f"positions resized from {side} x {side} to {grid[0]} x {grid[1]}")
    missing, surplus = own - set(state), set(state) - own
    # "exactly": a head that is already in the file is as unexpected as a missing block.
    _complain(source, model, state, missing - head, (surplus - left_out) | (head - missing))
    model.load_state_dict(state, strict=False)
    new, unused = (", ".join(_modules(keys)) or "nothing" for keys in (missing, surplus))
    dist.say(f"encoder from {source}; new here: {new}; in the file but not used: {unused}")
    return missing, surplus

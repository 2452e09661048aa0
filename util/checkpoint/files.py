"""Checkpoint files: written whole or not at all, and read without running any code that is in them."""

import argparse
import hashlib
import os
import pickle
import re
import ssl
import urllib.error
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from util.checkpoint import configurations, formats, wrappings
from util.checkpoint.safe_types import SAFE_TYPES
from util.disk import fsync_path, is_utf8
from util.distributed import dist
from util.errors import UserError
from util.words import join_names

FOLDER_BIT = 0x10  # in a zip entry's external attributes
CHUNK = 1 << 24  # bytes
# What to do about a damaged file, for messages.
REMEDY = "Take an earlier checkpoint (--resume auto takes the newest that is whole), or download the file again"


def is_url(source: str) -> bool:
    """Return whether a source is an http(s) address."""
    return source.startswith(("http://", "https://"))


class _NotingErrors:
    """A file to write to that remembers the error that stopped it, which torch.save would wrap beyond recognition."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except Exception as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def digest_file(path: Path) -> Path:
    """Return the path of the SHA-256 that earlier versions wrote beside a checkpoint; it is no longer read."""
    return path.with_name(path.name + ".sha256")


def write_checkpoint(state: dict, paths: list[Path]) -> None:
    """Write a checkpoint under each of the names, the first one first.

    A file of that name is replaced only once the new one is whole and on the disk.

    Raises:
        UserError: It cannot be written. Each name still has a whole file, if it had one: the old one, or the new one
            where the error came only during the renaming.
    """
    unfinished = [path.with_name(path.name + ".tmp") for path in paths]
    noting = None
    try:
        # Write everything under temporary names, and wait until it is on the disk. The folder may have been removed.
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        with unfinished[0].open("wb") as file:
            noting = _NotingErrors(file)
            torch.save(state, noting)
            file.flush()
            os.fsync(file.fileno())
        for copy in unfinished[1:]:  # a copy, not a link: a disk error in one file leaves the other intact
            _copy(unfinished[0], copy)

        # Renaming is atomic: at any time each name stands for the old file or the new one.
        for path, temporary in zip(paths, unfinished, strict=True):
            os.replace(temporary, path)
            fsync_path(path.parent)
            digest_file(path).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # The user needs the error of the disk, or what a handler of signals raised meanwhile, such as the death of a
        # loader process; not the RuntimeError that torch.save makes of it at closing the file. Any other is a bug.
        closing = isinstance(error, RuntimeError) and "inline_container" in str(error)
        cause = (noting and noting.error) or (closing and error.__context__) or error
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)
        if not isinstance(cause, OSError):
            raise cause from error
        raise UserError(
            f"cannot write {paths[0]}: {cause.strerror or cause}. Earlier checkpoints are untouched: "
            "make room and resume with --resume auto"
        ) from error


def _copy(source: Path, target: Path) -> None:
    """Copy a file, and wait until the copy is on the disk."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def find_damage(path: Path) -> str:
    """Return a sentence about the damage to a checkpoint, or "" if none is found.

    Damage is an archive that can't be opened, a record whose checksum is wrong, or a record that is marked as a folder
    or as compressed. torch.load compares no checksums. Only zip archives, which torch.save has written since version
    1.6, are checked here: older files and .safetensors hold no checksums. An OSError of reading is passed on.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return ""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # For an entry that is marked as a folder torch.load returns memory that nothing was read into.
            irregular = [
                entry.filename
                for entry in archive.infolist()
                if entry.external_attr & FOLDER_BIT or entry.compress_type != zipfile.ZIP_STORED
            ]
    except OSError:
        raise
    except Exception as error:  # for a damaged header zipfile raises half a dozen kinds
        return f"{path} is not a whole PyTorch checkpoint: {str(error) or type(error).__name__}"
    if damaged:
        return f"{path} is damaged: the checksum of its record {damaged} is wrong"
    problem = "is damaged, or was not written by torch.save: it marks its record"
    return f"{path} {problem} {irregular[0]} as a folder or as compressed" if irregular else ""


def load_checkpoint(source: str, peek: bool = False, ema: bool = False) -> dict:
    """Read a checkpoint from a file, folder or http(s) address, on the CPU, without running any code that is in it.

    A bare state dict, a .safetensors file, a folder of Hugging Face's or timm's, or another program's checkpoint comes
    back in the form of a checkpoint as well: the weights under their native names, with what a config.json tells as
    "model_config", "class_to_idx" and "args". "format" then names the library and the model where the names were
    another library's, and "left_out" lists the weights that are no part of the encoder or have no place here. A notice
    says where in the file the weights were.

    Args:
        source: File, folder or address; for an address all ranks must call, since rank 0 downloads first.
        peek: Leave tensors on the disk, and check no checksums; only for a file of torch.save, ignored for others.
        ema: Return the EMA of the weights as "model"; without it, an EMA is taken only where there is nothing else.

    Returns:
        The checkpoint, whose "model" is a state dict.

    Raises:
        UserError: The source, which the message names, is missing, damaged, unsafe to load, or not a checkpoint, or
            holds no EMA although `ema` asks for it.
    """
    with torch.serialization.safe_globals(SAFE_TYPES), _raise_read_errors(source):
        content = _read(source, peek)
    checkpoint, left_out = _as_checkpoint(source, content, ema)
    recognised = formats.recognise(checkpoint["model"])
    checkpoint["model"] = recognised.state
    if recognised.kind:
        checkpoint["format"] = recognised.kind
    checkpoint["left_out"] = left_out + recognised.left_out
    return checkpoint


def _read(source: str, peek: bool) -> object:
    """Return the content of a file, folder or address, choosing the reader by its kind."""
    if is_url(source):
        return _download(source)
    if weight_files := configurations.weights_in(Path(source)):
        return _read_folder(Path(source), weight_files)
    # A config.json describes a file of weights that lies beside it under one of the usual names.
    path = Path(source)
    if path.name in configurations.WEIGHT_FILES and path.is_file() and (path.parent / "config.json").is_file():
        return _read_folder(path.parent, [path])
    return _load_safetensors(path) if source.endswith(".safetensors") else _load_pickled(path, peek)


@contextmanager
def _raise_read_errors(source: str) -> Iterator[None]:
    """Turn the errors of reading a checkpoint into a UserError that names the source, the problem and the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"cannot download {source}: {error}. Check the address and the network, or pass a file"
        ) from error
    except IsADirectoryError as error:
        raise UserError(
            f"{source} is a folder without weights that can be read here, such as model.safetensors (ONNX can't be)"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}. Check the path") from error
    except Exception as error:  # damaged files raise errors of any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source} is not a whole PyTorch checkpoint: {reason}. {REMEDY}") from error


def _refusal(path: Path, name: str) -> str:
    """Return the message for a file that holds a type which could run code, with the lines that save its weights."""
    target = str(path.with_name(f"{path.stem}-weights.pth"))
    return (
        f"{path} is refused: it holds {name}, and loading it could run code. Nothing in it was run. If you trust it, "
        "save its weights alone, in Python, and pass that file:\n"
        "  import torch\n"
        "  def weights(x):\n"
        "      x = x.state_dict() if hasattr(x, 'state_dict') else x\n"
        "      return {k: v if torch.is_tensor(v) else weights(v) for k, v in x.items()\n"
        "              if torch.is_tensor(v) or hasattr(v, 'state_dict') or isinstance(v, dict)}\n"
        f"  file = {str(path)!r}\n"
        f"  torch.save(weights(torch.load(file, 'cpu', weights_only=False)), {target!r})"
    )


def _as_checkpoint(source: str, content: object, ema: bool) -> tuple[dict, list[str]]:
    """Return the content of a file as a checkpoint, with its weights under "model".

    Args:
        source: Name of the file, for messages.
        content: What was read from it.
        ema: Take the EMA of the weights.

    Returns:
        The checkpoint, and the names of the weights that are no part of the Vision Transformer.

    Raises:
        UserError: It holds no weights, or no EMA.
    """
    found = wrappings.unwrap(content, ema)
    if found and not found.steps:
        # A checkpoint of this project or the reference, a state dict, or another program's of the same form.
        return _plausible_entries(content) | {"model": found.state}, found.outside
    if found and ema and content.get("model_ema") is not None and "job" in content:
        return content | {"model": found.state}, found.outside
    if found:
        # Another program's: of the rest only the preprocessing means the same here, and a folder's config.json.
        _refuse_mocos_small_model(source, content)
        dist.print_rank0(f"notice: weights of {source}: {found.steps}")
        described = ("model_config", "described", "class_to_idx", "from_folder") if content.get("from_folder") else ()
        kept = {name: content[name] for name in described if name in content}
        return kept | {"model": found.state, "args": _preprocessing(checkpoint_args(content))}, found.outside

    if ema:
        raise UserError(f"{source} holds no EMA of the weights: leave out --model_ema")
    weights = content.get("model", content) if isinstance(content, dict) else content
    if isinstance(weights, dict) and weights and all(isinstance(value, Tensor) for value in weights.values()):
        return (content if "model" in content else {"model": weights}), []  # of another model, as messages will say
    keys = f", but {join_names(map(str, content))}" if isinstance(content, dict) and content else ""
    raise UserError(
        f"{source} is not a checkpoint: it holds no weights of a Vision Transformer{keys}. Pass a checkpoint, a state "
        "dict, a .safetensors file, or a folder of Hugging Face's or timm's"
    )


def _refuse_mocos_small_model(source: str, content: object) -> None:
    """Raise a UserError for MoCo v3's ViT-S, which has another number of heads, where the shapes don't show it.

    Its pre-training and its linear probing both store this name of the model; timm's is vit_small_patch16_224.
    """
    if isinstance(content, dict) and content.get("arch") == "vit_small":
        raise UserError(
            f"{source} seems to be MoCo v3's ViT-S, which has 12 attention heads instead of the usual 6. The shapes of "
            "its weights do not show it: with 6 it would compute something else. Use a ViT-B, or another ViT-S"
        )


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the weights in a .safetensors file; safetensors itself opens no file whose name is not UTF-8."""
    return load_file(path) if is_utf8(path) else safetensors.torch.load(path.read_bytes())


def _plausible_entries(content: dict) -> dict:
    """Return those entries of a checkpoint, other than its weights, that certainly mean the same here.

    These are all entries if the file names a "job" of this project or comes from a folder that was read with its
    config.json. Of any other file they are only the entries in the form of the reference's checkpoints.
    """
    if "model" not in content:
        return {}
    if content.get("job") in ("pretrain", "finetune", "linprobe") or content.get("from_folder"):
        return dict(content)
    entries, args = {}, checkpoint_args(content)
    classes = content.get("class_to_idx")
    if isinstance(classes, dict) and all(isinstance(number, int) for number in classes.values()):
        entries["class_to_idx"] = classes
    if configurations.is_model_config(content.get("model_config")):
        entries["model_config"] = content["model_config"]

    # The reference's flags, and with them a state to resume from.
    numbers = {name: args.get(name, 1) for name in ("batch_size", "accum_iter", "epochs", "warmup_epochs", "min_lr")}
    numbers["blr"] = args.get("blr")
    if not all(isinstance(value, (int, float)) for value in numbers.values()):
        return entries | {"args": _preprocessing(args)}
    foreign = {name: value for name, value in args.items() if name not in ("mean", "std", "crop_pct")}
    entries["args"] = foreign | _preprocessing(args)
    if isinstance(content.get("epoch"), int) and isinstance(content.get("optimizer"), dict):
        entries |= {name: content[name] for name in ("epoch", "optimizer", "scaler") if name in content}
    return entries


def _preprocessing(args: dict) -> dict:
    """Return mean, std and crop_pct from another program's flags, where they are numbers for pixels from 0 to 1."""
    kept = {}
    for name in ("mean", "std"):
        values = args.get(name)
        if isinstance(values, (list, tuple)) and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in values):
            kept[name] = list(values)
    if isinstance(args.get("crop_pct"), float) and 0 < args["crop_pct"] <= 1:
        kept["crop_pct"] = args["crop_pct"]
    return configurations.drop_incomplete_normalisation(kept)


def _read_folder(folder: Path, weight_files: list[Path]) -> dict:
    """Return a checkpoint from a folder of Hugging Face's or timm's: its weights, and entries from its configuration.

    Another LayerNorm eps than that of the models here is only reported by a notice.
    """
    state = {}
    for file in weight_files:
        state |= _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickled(file, peek=False)
    config = configurations.read_config(folder)
    checkpoint = {"model": state, "args": configurations.preprocessing(folder, config), "from_folder": True}
    if not str(config.get("model_type", "")).startswith("vit"):
        return checkpoint | configurations.from_export_config(config)

    # The models here have one activation, and a LayerNorm eps whose difference hardly shows.
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(
            f"{folder} does not fit: its activation is {activation}, that of the models here gelu, with which it would "
            "compute something else. Use it in the library that it is from"
        )
    # Without the key transformers takes 1e-12.
    eps = config.get("layer_norm_eps", 1e-12)
    if abs(eps - 1e-6) > 1e-7:
        dist.print_rank0(f"notice: {folder} was made with a LayerNorm eps of {eps:g}; the models here use 1e-6")
    return checkpoint | configurations.from_hugging_face_config(config)


def checkpoint_args(checkpoint: dict) -> dict:
    """Return the flags that a checkpoint was made with; the reference stores them as a Namespace."""
    args = checkpoint.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def effective_batch(flags: dict) -> int | None:
    """Return the number of images per update over all ranks, or None if the flags do not tell."""
    names = ("batch_size", "accum_iter", "world_size")
    if not all(name in flags for name in names):
        return None
    return flags["batch_size"] * flags["accum_iter"] * flags["world_size"]


def _load_pickled(path: Path, peek: bool) -> object:
    """Open a file of torch.save after checking its checksums; with peek its tensors stay on the disk, unchecked.

    Raises:
        UserError: The file is damaged, or holds what could run code.
    """
    if not peek and (problem := find_damage(path)):
        raise UserError(f"{problem}. {REMEDY}")
    try:
        # torch maps files by their names in UTF-8: any other is read whole.
        return torch.load(path, "cpu", weights_only=True, mmap=True if peek and is_utf8(path) else None)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(_refusal(path, forbidden[1])) from error
        with path.open("rb") as file:
            begins = file.read(200).lstrip()[:1]
        if begins == b"<":
            raise UserError(f"{path} is a web page, no checkpoint: download the file that the page is about") from error
        raise UserError(
            f"{path} is not a checkpoint of plain types and tensors: check that it was saved by torch.save and "
            "downloaded whole"
        ) from error


def _download(url: str) -> object:
    """Return the content of the file at an address, which is downloaded once and kept in torch.hub's folder.

    All ranks must call: rank 0 downloads, and the others then read its copy, or download where they can't see it.

    torch.hub names its files by the last part of the address; a digest of the whole address keeps two that end alike
    apart.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name

    def load() -> object:
        _fetch(url, path)
        try:
            return _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path, peek=False)
        except (UserError, RuntimeError, EOFError, SafetensorError):
            path.unlink(missing_ok=True)  # cut off on the way, perhaps: the next start downloads it again
            raise

    # Rank 0 downloads, and the others then read its copy. They wait for it in gather, which rank 0 must therefore reach
    # even where the download fails; the others will fail in the same way.
    try:
        content = load() if dist.rank() == 0 else None
    finally:
        dist.all_gather(None)
    return load() if content is None else content


def _fetch(url: str, path: Path) -> None:
    """Download the file at an address to a path, unless it is there already.

    Raises:
        UserError: The path's folder can't be created or written to.
        OSError: The address can't be reached or read.
    """
    problem = ""
    if str(path).startswith("~"):  # as it stays where neither HOME nor the system's list of users tells the folder
        problem = "there is no home folder"
    try:
        if not problem and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=dist.rank() == 0)
    except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError):
        raise  # the network's, all of which are OSErrors, too
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise UserError(
            f"cannot keep the download in {path.parent}: {problem}. Set TORCH_HOME to a folder that can be written to"
        )

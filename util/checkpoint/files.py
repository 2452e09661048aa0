"""Checkpoint files: written whole or not at all, and read without running any code that is in them."""

import argparse
import hashlib
import os
import pickle
import re
import urllib.error
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from util.checkpoint import formats
from util.checkpoint.output_dir import fsync_dir
from util.distributed import dist
from util.errors import UserError

FOLDER_BIT = 0x10  # in a zip entry's external attributes
CHUNK = 1 << 24  # bytes


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


def write(state: dict, paths: list[Path]) -> None:
    """Write a checkpoint under each of the names, the first one first.

    A file of that name is replaced only once the new one is whole and on the disk.

    Raises:
        UserError: It cannot be written. Each name still has a whole file, if it had one: the old one, or the new one
            where the error came only during the renaming.
    """
    unfinished = [path.with_name(path.name + ".tmp") for path in paths]
    noting = None
    try:
        # Write everything under temporary names, and wait until it is on the disk.
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
            fsync_dir(path.parent)
            digest_file(path).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # The user needs the disk's error, not the RuntimeError that torch.save makes of it. Any other is a bug.
        cause = (noting and noting.error) or error
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
    return f"{path} is damaged: its record {irregular[0]} is not a plain file" if irregular else ""


def load_checkpoint(source: str, peek: bool = False, ema: bool = False) -> dict:
    """Read a checkpoint from a file, folder or http(s) address, on the CPU, without running any code that is in it.

    A bare state dict, a .safetensors file, or a folder of Hugging Face's or timm's comes back in the form of a
    checkpoint as well, with what its config.json tells as "model_config", "class_to_idx" and "args". Weights under
    Hugging Face's names are renamed; "format" then names the library and the model, and "left_out" lists the weights
    that have no place here.

    Args:
        source: File, folder or address; for an address all ranks must call, since rank 0 downloads first.
        peek: Leave tensors on the disk, and check no checksums; only for a file of torch.save, ignored for others.
        ema: Return the EMA of the weights as "model".

    Returns:
        The checkpoint, whose "model" is a state dict.

    Raises:
        UserError: The source, which the message names, is missing, damaged, unsafe to load, or not a checkpoint, or
            holds no EMA although `ema` asks for it.
    """
    # The reference's checkpoints hold an argparse.Namespace: that one class is allowed.
    with torch.serialization.safe_globals([argparse.Namespace]), _raise_read_errors(source):
        content = _read(source, peek)
    checkpoint = _as_checkpoint(source, content)

    recognised = formats.recognise(checkpoint["model"])
    if recognised.kind:
        checkpoint |= {"model": recognised.state, "format": recognised.kind, "left_out": recognised.left_out}
    if ema:
        if "model_ema" not in checkpoint:
            raise UserError(f"{source} holds no EMA of the weights: leave out --model_ema")
        checkpoint["model"] = checkpoint["model_ema"]
    return checkpoint


def _read(source: str, peek: bool) -> object:
    """Return the content of a file, folder or address, choosing the reader by its kind."""
    if is_url(source):
        return _download(source)
    if weight_files := formats.weights_in(Path(source)):
        return _read_folder(Path(source), weight_files)
    if not source.endswith(".safetensors"):
        return _load_pickled(Path(source), peek)
    # The folder's config.json describes this file only if it is the one that the folder's model consists of.
    folder = Path(source).parent
    if Path(source) in formats.weights_in(folder):
        return _read_folder(folder, [Path(source)])
    return load_file(source)


@contextmanager
def _raise_read_errors(source: str) -> Iterator[None]:
    """Turn the errors of reading a checkpoint into a UserError that names the source, the problem and the remedy."""
    try:
        yield
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(
                f"{source} is refused: it holds {forbidden[1]}, and loading it could run code. Nothing in it was run. "
                "If you trust it, save its state dict alone, and pass that file"
            ) from error
        raise UserError(
            f"{source} is not a checkpoint of plain types and tensors, and nothing in it was run: check that it was "
            "saved by torch.save and downloaded whole"
        ) from error
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"cannot download {source}: {error}. Check the address and the network, or pass a file"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}. Check the path") from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source} is not a whole PyTorch checkpoint: {reason}. Take an earlier checkpoint, or --resume auto"
        ) from error


def _as_checkpoint(source: str, content: object) -> dict:
    """Return the content of a file as a checkpoint, with its weights under "model".

    Raises:
        UserError: It holds no weights.
    """
    if isinstance(content, dict) and "model" not in content and _is_state_dict(content):
        return {"model": content}
    if not isinstance(content, dict) or not _is_state_dict(content.get("model")):
        raise UserError(
            f"{source} is not a checkpoint: it has no 'model' with named tensors. Pass a checkpoint, a state dict, a "
            ".safetensors file, or a folder of Hugging Face's or timm's"
        )
    return content


def _read_folder(folder: Path, weight_files: list[Path]) -> dict:
    """Return a checkpoint from a folder of Hugging Face's or timm's: its weights, and entries from its configuration.

    Another LayerNorm eps than that of the models here is only reported by a notice.
    """
    state = {}
    for file in weight_files:
        state |= load_file(file) if file.suffix == ".safetensors" else _load_pickled(file, peek=False)
    config = formats.read_config(folder)
    checkpoint = {"model": state, "args": formats.preprocessing(folder, config)}
    if not str(config.get("model_type", "")).startswith("vit"):
        return checkpoint | formats.from_export_config(config)

    # Without the key transformers takes 1e-12.
    eps = config.get("layer_norm_eps", 1e-12)
    if abs(eps - 1e-6) > 1e-7:
        dist.print_rank0(f"notice: {folder} was made with a LayerNorm eps of {eps:g}; the models here use 1e-6")
    return checkpoint | formats.from_hugging_face_config(config)


def checkpoint_args(checkpoint: dict) -> dict:
    """Return the flags that a checkpoint was made with; the reference stores them as a Namespace."""
    args = checkpoint.get("args") or {}
    return vars(args) if isinstance(args, argparse.Namespace) else args


def _load_pickled(path: Path, peek: bool) -> object:
    """Open a file of torch.save after checking its checksums; with peek its tensors stay on the disk, unchecked.

    Raises:
        UserError: The file is damaged.
    """
    if not peek and (problem := find_damage(path)):
        raise UserError(f"{problem}. Take an earlier checkpoint, or --resume auto")
    return torch.load(path, "cpu", weights_only=True, mmap=True if peek else None)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _download(url: str) -> object:
    """Return the content of the file at an address, which is downloaded once and kept in torch.hub's folder.

    All ranks must call: rank 0 downloads, and the others then read its copy, or download where they can't see it.

    torch.hub names its files by the last part of the address; a digest of the whole address keeps two that end alike
    apart.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name

    def load() -> object:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=dist.rank() == 0)
        return load_file(path) if path.suffix == ".safetensors" else _load_pickled(path, peek=False)

    # Rank 0 downloads, and the others then read its copy. They wait for it in gather, which rank 0 must therefore reach
    # even where the download fails; the others will fail in the same way.
    try:
        content = load() if dist.rank() == 0 else None
    finally:
        dist.gather(None)
    return load() if content is None else content

"""Checkpoint files: written whole or not at all, and read without running what is in them."""

import argparse
import hashlib
import os
import pickle
import re
import urllib.error
import zipfile
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


def is_url(source: str) -> bool:
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
        UserError: It can't be written; the old files are untouched.
    """
    unfinished = [path.with_name(path.name + ".tmp") for path in paths]
    noting = None
    try:
        with unfinished[0].open("wb") as file:
            noting = _NotingErrors(file)
            torch.save(state, noting)
            file.flush()
            os.fsync(file.fileno())
        for copy in unfinished[1:]:  # a copy, not a link: a disk's error in the one leaves the other
            _copy(unfinished[0], copy)
        for path, temporary in zip(paths, unfinished, strict=True):
            os.replace(temporary, path)
            fsync_dir(path.parent)
            digest_file(path).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
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
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(1 << 24):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint by the CRC-32 that its zip archive holds of each record, or "".

    torch.load does not look at them. Only zip archives, which torch.save has written since version 1.6, hold any: of
    older files and of .safetensors nothing is known here.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return ""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            # Of an entry that is marked as a folder torch.load takes memory that nothing was read into.
            odd = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10 or entry.compress_type]
    except OSError:
        raise
    except Exception as error:  # a damaged header leads zipfile to half a dozen kinds
        return f"{path} is not a whole PyTorch checkpoint: {str(error) or type(error).__name__}"
    if record:
        return f"{path} is damaged: the checksum of its record {record} is wrong"
    return f"{path} is damaged: its record {odd[0]} is no plain file" if odd else ""


def load_checkpoint(source: str, peek: bool = False, ema: bool = False) -> dict:
    """Read a checkpoint from a file or an http(s) address, on the CPU, without running any code that is in it.

    The reference's checkpoints hold an argparse.Namespace: that one class is allowed. A bare state dict, a .safetensors
    file or a folder of Hugging Face's or timm's comes back as {"model": ...}, with what its config.json says, and under
    our names ("format" then says what it was, "left_out" what has no place here). A zip archive's checksums are checked
    first. With peek tensors stay on the disk, and neither checksums nor weights are looked at. With ema the running
    average of the weights stands as "model". Raises UserError, naming the source, for a file that is missing, damaged,
    refused or not a checkpoint.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if is_url(source):
                checkpoint = _download(source)
            elif parts := formats.weights_in(Path(source)):
                checkpoint = _folder(Path(source), parts)
            elif source.endswith(".safetensors"):
                described = Path(source) in formats.weights_in(Path(source).parent)  # or the config may be another's
                checkpoint = _folder(Path(source).parent, [Path(source)]) if described else load_file(source)
            else:
                checkpoint = _load_pickled(Path(source), peek)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = "is not a checkpoint of plain types and tensors: was it saved by torch.save, and downloaded whole?"
            if found:
                what = f"is refused: it holds {found[1]}, and loading it could run code."
            raise UserError(f"{source} {what} Nothing in it was run.") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise UserError(f"cannot download {source}: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror or error}") from error
        except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{source} is not a whole PyTorch checkpoint: {what}. Take an earlier one, or --resume auto"
            ) from error
    if isinstance(checkpoint, dict) and "model" not in checkpoint and _is_state_dict(checkpoint):
        checkpoint = {"model": checkpoint}
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise UserError(f"{source} is not a checkpoint: it has no 'model' with named tensors")
    if (found := formats.recognise(checkpoint["model"])).kind:
        checkpoint |= {"model": found.state, "format": found.kind, "left_out": found.left_out}
    if ema:
        if "model_ema" not in checkpoint:
            raise UserError(f"{source} holds no running average: leave out --model_ema")
        checkpoint["model"] = checkpoint["model_ema"]
    return checkpoint


def _folder(folder: Path, parts: list[Path]) -> dict:
    """A folder's weights and what its config says of them."""
    state = {}
    for part in parts:
        state |= load_file(part) if part.suffix == ".safetensors" else _load_pickled(part, peek=False)
    config = formats.read_config(folder)
    known = {"model": state, "args": formats.preprocessing(folder, config)}
    if not str(config.get("model_type", "")).startswith("vit"):
        return known | formats.from_our_config(config)
    if abs(config.get("layer_norm_eps", 1e-12) - 1e-6) > 1e-7:
        dist.print_rank0(
            f"notice: {folder} has LayerNorms with eps {config.get('layer_norm_eps', 1e-12):g}, ours is 1e-6"
        )
    return known | formats.from_hugging_face_config(config)


def checkpoint_args(checkpoint: dict) -> dict:
    """The flags that a checkpoint was made with; the reference stores them as a Namespace."""
    args = checkpoint.get("args") or {}
    return vars(args) if isinstance(args, argparse.Namespace) else args


def _load_pickled(path: Path, peek: bool) -> dict:
    """Open a file of torch.save, after its checksums; with peek its tensors stay on the disk, unchecked.

    Raises:
        UserError: The file is damaged.
    """
    if not peek and (problem := damage(path)):
        raise UserError(f"{problem}. Take an earlier one, or --resume auto")
    return torch.load(path, "cpu", weights_only=True, mmap=True if peek else None)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _download(url: str) -> dict:
    """torch.hub's cache goes by file name alone; a digest of the whole address keeps two that end alike apart."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name

    def load() -> dict:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=dist.rank() == 0)
        return load_file(path) if path.suffix == ".safetensors" else _load_pickled(path, peek=False)

    # One download for all ranks; its failure is every rank's, so the others are met in any case.
    try:
        checkpoint = load() if dist.rank() == 0 else None
    finally:
        dist.gather(None)
    return load() if checkpoint is None else checkpoint

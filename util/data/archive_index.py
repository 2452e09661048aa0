"""The index of an archive: which files are in it, and where.

It is built from the archive's headers, about 150,000 per second unless the disk is slower. If ARCHIVE.index, which
scripts/pack.py writes, lies beside the archive, it is read instead, as long as it is current: it must state the
archive's present size and modification time, and the headers of the first and the last file must lie where it says.
"""

import json
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data import tar
from util.data.tar import BadArchive

VERSION = 1  # of the format of saved indexes


@dataclass
class ArchiveIndex:
    """Files in an archive, without hidden ones.

    Attributes:
        names: Their names, without "./" or "/" in front and the like.
        offsets: Where their bytes begin [files].
        sizes: Number of their bytes [files].
        folders: Names of the folders that have an entry of their own.
        others: What is neither a file nor a folder: its kind by its name.
        has_end: Whether the archive has the mark with which most programs end it.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    folders: list[str]
    others: dict[str, str]
    has_end: bool


def load_index(path: Path) -> ArchiveIndex:
    """Return the index of an archive: the saved one if it belongs to the archive, else from the headers.

    Raises:
        BadArchive: The archive can't be read, is no plain tar archive, or is cut off or damaged.
    """
    with _open(path) as fd:
        return _read_saved(path, fd) or _read_headers(path, fd)


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """Return a context that opens an archive and gives its descriptor; raises what load_index raises."""
    if not hasattr(os, "pread"):
        raise BadArchive(f"{path} can't be read in place on Windows: unpack it into folders")
    try:
        with path.open("rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        raise BadArchive(f"cannot read {path}: {error.strerror}. Check the file and its permissions") from error


def has_current_index(path: Path) -> bool:
    """Return whether an archive has a saved index that belongs to it as it is; raises what load_index raises."""
    with _open(path) as fd:
        return _read_saved(path, fd) is not None


def write_index(path: Path, out: BinaryIO) -> ArchiveIndex:
    """Read an archive's headers, write the index to an open file, and return it; raises what load_index raises."""
    with _open(path) as fd:
        index, status = _read_headers(path, fd), os.fstat(fd)
    np.savez(
        out,
        archive=np.array([VERSION, status.st_size, status.st_mtime_ns, index.has_end]),
        names=_join(index.names),
        offsets=index.offsets,
        sizes=index.sizes,
        folders=_join(index.folders),
        others=_join([json.dumps(index.others)]),
    )
    return index


def _join(names: list[str]) -> np.ndarray:
    """Return names as an array of bytes, each with a zero byte after it, which no name contains."""
    return np.frombuffer(os.fsencode("".join(f"{name}\0" for name in names)), np.uint8)


def _split(names: np.ndarray) -> list[str]:
    return os.fsdecode(names.tobytes()).split("\0")[:-1]


def _read_saved(path: Path, fd: int) -> ArchiveIndex | None:
    """Return the saved index of an archive; None if there is none, or it does not belong to the archive as it is."""
    try:
        with np.load(f"{path}.index", allow_pickle=False) as saved:
            status = os.fstat(fd)
            *stated, has_end = saved["archive"].tolist()
            if stated != [VERSION, status.st_size, status.st_mtime_ns]:
                return None
            index = ArchiveIndex(
                _split(saved["names"]),
                saved["offsets"].astype(np.int64),
                saved["sizes"].astype(np.int64),
                _split(saved["folders"]),
                json.loads(_split(saved["others"])[0]),
                bool(has_end),
            )
    except Exception:  # there is none, or it is damaged in whatever way: the headers tell the same
        return None

    # Look at the first and the last file.
    for number in {0, len(index.names) - 1} if index.names else ():
        header = os.pread(fd, tar.BLOCK, int(index.offsets[number]) - tar.BLOCK)
        if not tar.header_fits(header, os.fsencode(index.names[number]), int(index.sizes[number])):
            return None
    return index


def _read_headers(path: Path, fd: int) -> ArchiveIndex:
    """Return the index of an archive from its headers; raises what load_index raises."""
    names, offsets, sizes, folders, others, kinds = [], [], [], [], [], []
    reader = tar.HeaderReader(str(path), fd)
    for name, offset, size, kind in reader.members():
        if kind == "file":
            names.append(name)
            offsets.append(offset)
            sizes.append(size)
        elif kind == "folder":
            folders.append(name.rstrip(b"/"))
        else:
            others.append(name)
            kinds.append(kind)

    # Leave hidden files out.
    names = clean_names(path, names)
    shown = [number for number, name in enumerate(names) if name]
    return ArchiveIndex(
        [names[number] for number in shown],
        np.array(offsets, np.int64)[shown],
        np.array(sizes, np.int64)[shown],
        [name for name in clean_names(path, folders) if name],
        {name: kind for name, kind in zip(clean_names(path, others), kinds, strict=True) if name},
        reader.has_end,
    )


def clean_names(path: Path, stored: list[bytes]) -> list[str]:
    """Return names without what makes no difference, such as "./" in front; "" for hidden files and folders.

    Raises:
        BadArchive: A name leads out of the archive.
    """
    text = os.fsdecode(b"\0".join([b"", *stored]))
    names = text.split("\0")[1:]
    if not any(sign in text for sign in ("\0.", "\0/", "/.", "//")):
        return names

    for number, name in enumerate(names):
        name = posixpath.normpath(name.lstrip("/") or ".")
        if name.split("/", 1)[0] == "..":
            raise BadArchive(
                f"{path} has a member named {names[number]}, outside of any folder: pack the images anew, with names "
                "that don't begin with .."
            )
        names[number] = "" if name[0] == "." or "/." in name else name
    return names

"""output_dir: who may write there, and writing there so that a crash leaves the old file or the new one, whole."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: dict[str, int] = {}  # folder -> the open lock file


def unwritable(folder: str) -> str:
    """Why a folder, or its first parent that exists, can't be written to; empty if it can. Leaves nothing behind."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"{place}: {error.strerror}"


def lock_output_dir(folder: str) -> str:
    """Take the folder for this process until it ends, however it ends; returns who has it already, or "".

    A POSIX record lock: unlike flock's, the loader's processes don't inherit it and keep it when this one is killed.
    """
    path = Path(folder).absolute()
    if fcntl is None or str(path) in _held:
        return ""
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        elsewhere = " on " in holder and not holder.endswith(f" on {socket.gethostname()}")
        return holder + f"; if that machine is down, remove {path / '.lock'}" * elsewhere
    except OSError:  # a file system without locks
        os.close(lock)
        return ""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[str(path)] = lock
    return ""


@contextmanager
def raise_write_errors(path: Path) -> Iterator[None]:
    """Around what writes a file on rank 0 for all: raises UserError, every rank's error, where it can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def fsync_dir(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Put a small text file in place of another, all or nothing."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)

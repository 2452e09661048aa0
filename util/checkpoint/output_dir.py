"""The output folder: its lock, its permissions, and writing that leaves a whole file, old or new, after a crash."""

import errno
import os
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from util.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # name of the lock file in a locked folder
UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are being written

_held: dict[str, int] = {}  # path of the folder -> descriptor of its lock file


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is stored on the disk as UTF-8, which libraries that encode names themselves assume."""
    try:
        return str(Path(path).absolute()).encode() == os.fsencode(Path(path).absolute())
    except UnicodeEncodeError:
        return False


def unwritable(folder: str | Path) -> str:
    """Return the reason why a folder cannot be written to, or "" if it can; nothing is left behind.

    Where the folder does not exist yet, its first parent that does is tried.
    """
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


def unwritable_file(path: Path) -> str:
    """Return the reason why `write_whole` cannot write a file, or "" if it can, as far as the file's folder tells."""
    if path.is_dir():
        return "it is a folder"
    # What is no regular file, such as /dev/null, is written to directly, whatever its folder permits.
    if path.exists() and not path.is_file():
        return ""
    try:
        return unwritable(_follow_links(path).parent)
    except OSError as error:
        return f"{path}: {error.strerror}"


def lock_output_dir(folder: str) -> str:
    """Create a folder if needed, and lock it for this process until it ends, however it ends.

    The lock is a POSIX record lock, which child processes do not inherit. A lock made with flock would be inherited by
    the loader's processes, which would keep the folder locked after this process is killed.

    Returns:
        The process that holds the folder already, in words; "" if the folder is locked for this process now, or the
        system has no locks.
    """
    path = Path(folder).absolute()
    if fcntl is None or str(path) in _held:
        return ""
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        # The lock file names its holder. After a crash of another machine, the file server may keep that one's lock.
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        if " on " in holder and not holder.endswith(f" on {socket.gethostname()}"):
            holder += f"; if that machine is down, remove {path / LOCK}"
        return holder
    except OSError:  # a file system without locks
        os.close(lock)
        return ""

    # The descriptor stays open: closing it would release the lock.
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    with suppress(OSError):  # not every file system can
        os.fsync(lock)  # other machines are to read it, too (`sees_mark`)
    _held[str(path)] = lock
    return ""


def lock_mark(folder: str) -> str:
    """Return what this process has written into the lock file of a folder that it locked; "" if it locked none."""
    # Opening the file again and closing it would release the lock: read through the descriptor that is open.
    descriptor = _held.get(str(Path(folder).absolute()))
    return os.pread(descriptor, 200, 0).decode() if descriptor is not None else ""


def sees_mark(folder: str, mark: str, patience: float = 60.0) -> bool:
    """Return whether this process finds another's mark, made perhaps on another machine, in a folder's lock file.

    Args:
        folder: The folder that the other has locked. This process must not have locked it itself.
        mark: The other's `lock_mark`; "": there is nothing to find.
        patience: Seconds that a network file system may take to show a new file.
    """
    end = time.monotonic() + patience
    while mark and _read_lock(folder) != mark:
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _read_lock(folder: str) -> str:
    """Return the text of a folder's lock file; "" if it can't be read."""
    try:
        return (Path(folder) / LOCK).read_text(errors="replace")
    except OSError:
        return ""


@contextmanager
def raise_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of code that writes a file, or safetensors' own error, into a UserError, in this process only.

    Within dist.run_on_rank0 it thereby reaches every rank.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}. Make room, or choose another path") from error


def fsync_path(path: Path) -> None:
    """Wait until what was written to a file, or the renames in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Shared folders of virtual machines and some network disks can't do this for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _follow_links(path: Path) -> Path:
    """Return the path without links; raise an OSError where they lead in a circle."""
    try:
        return path.resolve()
    except RuntimeError as error:  # Python before 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Return a context that gives a path to write to; at its end the file takes the place of `path`, whole.

    After an error or a crash `path` is as it was before. What is no regular file, such as /dev/stdout, is written to
    directly.

    Args:
        path: The file; its folder is made if needed. A link stays a link, to the new file.

    Raises:
        UserError: It can't be written.
    """
    with raise_write_errors(path):
        if path.exists() and not path.is_file():
            yield path
            return
        target = _follow_links(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not by the process's number: in containers many have the same. Libraries look at the suffix.
        unfinished = target.with_name(f"{UNFINISHED}{secrets.token_hex(8)}{target.suffix}")
        try:
            yield unfinished
            fsync_path(unfinished)
            os.replace(unfinished, target)
            fsync_path(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path, idle: float = 0.0) -> None:
    """Remove the unfinished files and folders that killed processes left in a folder.

    Args:
        folder: Where they lie.
        idle: Seconds since one was last written to at which it counts as left; others may be a running process's.
    """
    for path in folder.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - path.stat().st_mtime >= idle:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # a running process's, which is finished now
            continue


def write_text_whole(path: Path, text: str) -> None:
    """Write a small text file, so that after a crash it holds either its old text or the new one, whole."""
    with write_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def events_suffix(output_dir: str, log_dir: str) -> str:
    """Return how the names of a run's TensorBoard files end in log_dir, which several runs may share.

    It is empty where log_dir is output_dir, which belongs to one run.
    """
    folder, logs = Path(output_dir).absolute(), Path(log_dir).absolute()
    return "" if folder == logs else f".{zlib.crc32(os.fsencode(folder)):08x}"

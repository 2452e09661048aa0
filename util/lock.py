"""Lock folders, each for one process, and recognise a lock that was taken on another machine."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # name of the lock file in a locked folder

_held: dict[str, int] = {}  # path of the folder -> descriptor of its lock file


def lock_folder(folder: str) -> str:
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


def sees_mark(folder: str, mark: str, patience: float) -> bool:
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

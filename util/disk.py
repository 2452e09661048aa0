"""Write files so that after a crash each is whole, old or new; and find out beforehand what can be written."""

import csv
import errno
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from util.errors import UserError

STANDARD_OUTPUT = Path("-")
UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are being written


def output_path(text: str) -> Path:
    """Return the path that a flag names, without `..`, for argparse.

    Until a folder NEW exists, NEW/../RUN does not either, so that nobody would see what lies in RUN.
    """
    return _follow_links(Path(text)) if ".." in Path(text).parts else Path(text)


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
    if path == STANDARD_OUTPUT or (path.exists() and not path.is_file()):
        return ""
    try:
        return unwritable(_follow_links(path).parent)
    except OSError as error:
        return f"{path}: {error.strerror}"


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


def write_csv(path: Path, rows: Iterable[list]) -> None:
    """Write a CSV file, each row as soon as it is there; after an error the file is as it was before.

    Names that are not UTF-8 are written with the bytes that they have on the disk.

    Args:
        path: The file, or STANDARD_OUTPUT.
        rows: The rows.

    Raises:
        UserError: It can't be written.
    """
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    if path == STANDARD_OUTPUT:
        with raise_write_errors(path), open(sys.__stdout__.fileno(), "w", closefd=False, **options) as file:
            csv.writer(file).writerows(rows)
        return
    with write_whole(path) as unfinished, unfinished.open("w", **options) as file:
        csv.writer(file).writerows(rows)

"""The files of a folder of classes, listed once and remembered.

Walking a million files takes long on a network disk, so the list is kept in $XDG_CACHE_HOME/mae (~/.cache/mae) and
taken again until a folder's time of change says that files came or went. It is held as arrays rather than a list of a
million strings: loader processes share arrays, while counting references to strings copies them page by page.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

# A folder changed so shortly before it was listed could have changed once more within the clock's grain.
GRAIN_NS = 2_000_000_000


@dataclass
class Listing:
    """(path, class) by number, in order of class, folder and name.

    names: the paths relative to root, one after the other, as bytes; ends [files]: where each one ends; targets
    [files]: class numbers; folders, changed: every folder that was looked into, and its time of change, ns.
    """

    root: str
    names: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    folders: np.ndarray
    changed: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str, int]:
        start = self.ends[index - 1] if index else 0
        name = self.names[start : self.ends[index]].tobytes()
        return os.path.join(self.root, os.fsdecode(name)), int(self.targets[index])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        names, start = self.names.tobytes(), 0
        for end, target in zip(self.ends.tolist(), self.targets.tolist(), strict=True):
            yield os.path.join(self.root, os.fsdecode(names[start:end])), target
            start = end


def of(root: str, class_to_idx: dict[str, int], wanted: Callable[[str], bool]) -> Listing:
    """The listing of root/<class>/**, of the files whose names are wanted; from the cache where nothing changed."""
    root = os.path.abspath(root)
    words = "\n".join([root, getattr(wanted, "__qualname__", ""), *class_to_idx])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "mae" / f"{hashlib.sha256(os.fsencode(words)).hexdigest()[:24]}.npz"
    listing = _read(root, cache)
    if listing is None:
        started = time.time_ns()
        listing = _walk(root, class_to_idx, wanted)
        if not len(listing.changed) or listing.changed.max() < started - GRAIN_NS:
            _write(listing, cache)
    return listing


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files' names), the folder relative to root ("": root itself), in order. Links are followed, hidden
    folders left out."""
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        relative = os.path.relpath(folder, root)
        relative = "" if relative == "." else relative
        if f"{os.sep}." not in f"{os.sep}{relative}":
            yield relative, sorted(files)


def _walk(root: str, class_to_idx: dict[str, int], wanted: Callable[[str], bool]) -> Listing:
    names, targets, folders, changed = [], [], [], []
    for name, target in class_to_idx.items():
        for inside, files in walk(os.path.join(root, name)):
            relative = os.path.join(name, inside) if inside else name
            folders.append(os.fsencode(relative))
            changed.append(os.stat(os.path.join(root, relative)).st_mtime_ns)
            found = [os.fsencode(os.path.join(relative, file)) for file in files if wanted(file)]
            names += found
            targets += [target] * len(found)
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    blob = np.frombuffer(b"".join(names), dtype=np.uint8)
    as_bytes = np.array(folders, dtype=bytes)
    return Listing(root, blob, ends, np.array(targets, np.int32), as_bytes, np.array(changed, np.int64))


def _read(root: str, cache: Path) -> Listing | None:
    """None where there is no cache, it cannot be read, or a folder changed since."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            listing = Listing(root, *(stored[field.name] for field in fields(Listing)[1:]))
        now = [os.stat(os.path.join(root, os.fsdecode(folder))).st_mtime_ns for folder in listing.folders.tolist()]
    except Exception:  # whatever a damaged archive raises, or a folder that is gone
        return None
    return listing if np.array_equal(now, listing.changed) else None


def _write(listing: Listing, cache: Path) -> None:
    temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.tmp.npz")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **{field.name: getattr(listing, field.name) for field in fields(Listing)[1:]})
        temporary.replace(cache)
    except OSError:  # a full or read-only home: the next start walks again
        with suppress(OSError):
            temporary.unlink()

"""List the images of a folder of classes.

The list is held as arrays rather than a list of a million strings: loader processes share arrays, while counting
references to strings copies them page by page.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from util.data.archives import MemberPath, Members
from util.data.pillow import EXTENSIONS, HEIC_ENDINGS, HEIC_REMEDY
from util.errors import UserError
from util.lock import LOCK
from util.words import count_nouns, join_names


class UnreadableFolder(UserError):
    """A folder that can't be listed, so that nobody knows what is in it."""


@dataclass
class LeftOut:
    """What a listing leaves out, apart from hidden files and folders.

    Attributes:
        endings: Number of files of other kinds, by their endings.
        beside: Images beside the class folders.
        broken: Links that lead nowhere, and what is neither a file nor a folder.
        repeated: Links to folders that are listed already, or that contain the link.
        no_end: Archives that have no end mark, so that members may be missing.
        apart: Folders of runs (--output_dir), whose pictures are no data, and of other splits, with their paths.
    """

    endings: Counter = field(default_factory=Counter)
    beside: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    no_end: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)

    def sort_out(self, files: list[str], is_wanted: Callable[[str], bool]) -> list[str]:
        """Return those of some file names that are wanted, and count the endings of the others."""
        wanted = [file for file in files if is_wanted(file)]
        if len(wanted) < len(files):
            others = set(files).difference(wanted)
            self.endings.update(os.path.splitext(file)[1].lower() for file in others)
        return wanted

    def __bool__(self) -> bool:
        return bool(str(self))

    def sentence(self) -> str:
        """Return a sentence for a message that says that no images were found; "" where nothing was left out."""
        return f" The files there: {self}." if self else ""

    def __str__(self) -> str:
        """Return a phrase that counts everything; "" where nothing was left out."""
        parts = []
        if self.endings:
            parts.append(f"{count_nouns(self.endings.total(), 'file')} of other kinds ({list_endings(self.endings)})")
        for names, what in (
            (self.beside, "image{} beside the class folders"),
            (self.broken, "broken link{0} or special file{0}"),
            (self.repeated, "link{} to folders that are in the list already"),
            (self.no_end, "archive{} without an end mark, of which a part may be missing"),
            (sorted(self.apart), "folder{} of other splits or of runs"),
        ):
            if names:
                parts.append(f"{len(names)} {what.format('s' * (len(names) > 1))} ({join_names(names, 3)})")
        return "; ".join(parts)


def exists(path: Path) -> bool:
    """Return whether a path exists; False also for a name that no file can have, at which Path.exists() may raise."""
    try:
        return path.exists()
    except OSError:
        return False


def list_endings(endings: Counter) -> str:
    """Return endings of file names with their numbers, for a message, the most frequent first."""
    remedies = dict.fromkeys(set(HEIC_ENDINGS).difference(EXTENSIONS), f": {HEIC_REMEDY}")
    return join_names(
        f"{ending or 'without ending'} {number}{remedies.get(ending, '')}" for ending, number in endings.most_common()
    )


@dataclass
class Listing:
    """Read-only sequence of (path, class number), in order of class, folder and name.

    Attributes:
        root: Folder that the paths in `names` are relative to; the sequence's items include it.
        names: The paths, one after the other, as bytes.
        ends: Where in `names` each path ends [files].
        targets: Class numbers [files].
        left_out: What is in the folders, and not in the list.
        classes: Names of the classes, in the order of their numbers.
        members: Where the files lie in archives; None: they are files by themselves. The sequence's paths then are
            MemberPaths.
        mixed: Whether files lie both in the root itself and in folders there, and all count as one class.
        held_out: Number of the split's files that are not in this list because some are held out for validation: for
            the training list the held-out files, for the validation list all others.
    """

    root: str
    names: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    left_out: LeftOut
    classes: list[str]
    members: Members | None = None
    mixed: bool = False
    held_out: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str | MemberPath, int]:
        return self._path(index, self.name(index)), int(self.targets[index])

    def __iter__(self) -> Iterator[tuple[str | MemberPath, int]]:
        for index, (name, target) in enumerate(zip(self.names_as_bytes(), self.targets.tolist(), strict=True)):
            yield self._path(index, os.fsdecode(name)), target

    def names_as_bytes(self) -> Iterator[bytes]:
        """Yield the path of each file, relative to the root, as bytes."""
        # Plain bytes and integers: indexing arrays a million times would take seconds.
        names, start = self.names.tobytes(), 0
        for end in self.ends.tolist():
            yield names[start:end]
            start = end

    def name(self, index: int) -> str:
        """Return the path of a file, relative to the root: <class>/<file>."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def select(self, wanted: np.ndarray) -> "Listing":
        """Return the list of some of the files; the others count as held out.

        Args:
            wanted: Whether to take each file [files].
        """
        lengths = np.diff(self.ends, prepend=0)
        return replace(
            self,
            names=self.names[np.repeat(wanted, lengths)],
            ends=np.cumsum(lengths[wanted]),
            targets=self.targets[wanted],
            members=self.members.select(wanted) if self.members else None,
            held_out=int(len(self) - wanted.sum()),
        )

    def renumber(self, classes: list[str]) -> "Listing":
        """Return the same list with the classes in another order, which may name classes without files, too.

        Args:
            classes: Names of the classes in the order of their new numbers; among them those that the list has.
        """
        numbers = {name: number for number, name in enumerate(classes)}
        renumbered = np.array([numbers[name] for name in self.classes], self.targets.dtype)
        return replace(self, targets=renumbered[self.targets], classes=classes)

    def _path(self, index: int, name: str) -> str | MemberPath:
        return MemberPath(self.members, index, name) if self.members else os.path.join(self.root, name)


def list_files(root: str, classes: list[str], is_wanted: Callable[[str], bool], apart: tuple[str, ...] = ()) -> Listing:
    """List the wanted files of all class folders and their subfolders, except hidden ones.

    Args:
        root: Folder that holds the class folders.
        classes: Names of the class folders; the name "" stands for root itself.
        is_wanted: Tells from a file's name whether to list it.
        apart: Names of folders to leave out where they lie directly in a class's folder.

    Returns:
        The files in order of class, folder and name.

    Raises:
        UnreadableFolder: A folder can't be read.
    """
    root, left_out = os.path.abspath(root), LeftOut()
    paths, targets = [], []
    for target, class_name in enumerate(classes):
        for subfolder, files in walk(os.path.join(root, class_name), left_out, apart):
            folder = os.path.join(class_name, subfolder) if subfolder else class_name
            wanted = left_out.sort_out(files, is_wanted)
            paths += [os.fsencode(os.path.join(folder, file)) for file in wanted]
            targets += [target] * len(wanted)

    # What lies beside the class folders belongs to no class.
    if "" not in classes:
        _, files = read_folder(root, left_out=left_out)
        left_out.beside += left_out.sort_out(files, is_wanted)
    ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
    names = np.frombuffer(b"".join(paths), dtype=np.uint8)
    return Listing(root, names, ends, np.array(targets, np.int32), left_out, classes)


def walk(root: str, left_out: LeftOut | None = None, apart: tuple[str, ...] = ()) -> list[tuple[str, list[str]]]:
    """Return each folder below a root, relative to it, with the sorted names of its files, in order of their paths.

    The root itself comes first, as "". Symbolic links are followed, but every folder is listed once, and none that
    contains the root. Hidden files and folders, and the folders of runs, are left out.

    Args:
        root: Folder to search.
        left_out: Takes what is left out, except for hidden files.
        apart: Names of folders in the root to leave out.

    Raises:
        UnreadableFolder: A folder can't be read.
    """
    left_out = LeftOut() if left_out is None else left_out
    # Count the folders that contain the root as seen already, since a link to one of them would lead back to the root:
    # its parents by the path as given, and by the path with links resolved.
    around = {*Path(os.path.abspath(root)).parents, *Path(os.path.realpath(root)).parents}
    seen = {_identity(str(folder)) for folder in around}

    # Links wait until all folders in their own places are listed, so that those stand under their own names.
    found, folders, links = [], [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, folder) if folder else root
        identity = _identity(path)
        if identity in seen:
            left_out.repeated.append(path)
            continue
        seen.add(identity)
        subfolders, files, is_run = scan_folder(path, folder, left_out)
        if folder and (is_run or folder in apart):
            left_out.apart.append(path)
            continue
        folders += [name for name, is_link in subfolders if not is_link]
        links = sorted(links + [name for name, is_link in subfolders if is_link])
        found.append((folder, files))
    return sorted(found, key=lambda entry: os.path.join(root, entry[0]))


def _identity(folder: str) -> tuple[int, int]:
    """Return the numbers of a folder's device and inode, the same by whichever path it is reached."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UnreadableFolder(f"cannot read {folder}: {error.strerror}. Check its permissions") from error
    return status.st_dev, status.st_ino


def read_folder(path: str, left_out: LeftOut | None = None) -> tuple[list[tuple[str, bool]], list[str]]:
    """Return the folders in a folder, as (name, whether it is a link), and the sorted names of its files.

    Args:
        path: The folder.
        left_out: Takes what is neither a file nor a folder.

    Raises:
        UnreadableFolder: It can't be read.
    """
    return scan_folder(path, "", left_out)[:2]


def scan_folder(path: str, name: str, left_out: LeftOut | None) -> tuple[list[tuple[str, bool]], list[str], bool]:
    """Return what read_folder returns, and whether the folder is one that a run has locked, as its --output_dir."""
    subfolders, files, is_run = [], [], False
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    is_run |= entry.name == LOCK
                    continue
                kind = _kind(entry)
                if kind == "folder":
                    subfolders.append((os.path.join(name, entry.name), entry.is_symlink()))
                elif kind == "file":
                    files.append(entry.name)
                elif left_out is not None:
                    left_out.broken.append(entry.path)
    except OSError as error:
        raise UnreadableFolder(
            f"cannot read {error.filename or path}: {error.strerror}. Check its permissions, or remove it"
        ) from error
    return subfolders, sorted(files), is_run


def _kind(entry: os.DirEntry) -> str:
    """Return "folder" or "file", of a link its target's kind, and "" for a broken link, a pipe, a device."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else ""
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):  # a link to itself, or through a file
            return ""
        raise

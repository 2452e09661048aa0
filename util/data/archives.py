"""Read images where they lie in tar archives: nothing is unpacked."""

import errno
import os
import posixpath
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from util import resources
from util.data import tar
from util.errors import LocalError

MOST_OPEN = 1024  # archives that a process keeps open, where the system allows it

_descriptors: OrderedDict[str, int] = OrderedDict()  # this process's open archives, the latest one last


def open_archive(path: str) -> int:
    """Return the descriptor of an archive, which stays open; of many archives, those used last stay open.

    Reading with os.pread uses no file position, so that forked processes can share the descriptor.

    Raises:
        LocalError: The archive can't be opened any more.
    """
    if path in _descriptors:
        _descriptors.move_to_end(path)
        return _descriptors[path]

    # A quarter of what the process may open: sockets, libraries and other files need some as well.
    most = max(1, min(MOST_OPEN, resources.allow_open_files(4 * MOST_OPEN) // 4))
    while len(_descriptors) >= most:
        os.close(_descriptors.popitem(last=False)[1])
    try:
        _descriptors[path] = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise LocalError(f"cannot open {path}: {error.strerror}. Was it moved or removed?") from error
    return _descriptors[path]


@dataclass
class Files:
    """Files in archives, as their headers list them.

    Attributes:
        archives: Paths of the archives.
        names: Name of each file.
        archive_ids: Index of its archive in `archives` [files].
        offsets: Where its bytes begin there [files].
        sizes: Its length in bytes [files].
        unfinished: The archives that have no end mark.
    """

    archives: list[Path]
    names: list[str]
    archive_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    unfinished: list[Path] = field(default_factory=list)

    def pick(self, chosen: list[int]) -> "Files":
        """Return the files of these indices, in their order."""
        names = [self.names[index] for index in chosen]
        places = self.archive_ids[chosen], self.offsets[chosen], self.sizes[chosen]
        return Files(self.archives, names, *places, self.unfinished)

    def path(self, index: int) -> str:
        """Return archive/name of a file, for messages."""
        return f"{self.archives[self.archive_ids[index]]}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Return the bytes of a file."""
        archive = str(self.archives[self.archive_ids[index]])
        return os.pread(open_archive(archive), int(self.sizes[index]), int(self.offsets[index]))


@dataclass
class Members:
    """Where the images of a listing lie in archives, in the listing's order.

    Attributes:
        archives: Paths of the archives.
        archive_ids: Index in `archives` of each image's archive [images].
        offsets: Where each image's bytes begin there [images].
        sizes: Its length in bytes [images].
        prefix: Leading folders of every name in the archives, which the names in the listing omit.
        adds_class: Whether the names in the listing begin with a class folder that the names in the archives lack.
    """

    archives: list[str]
    archive_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    prefix: str
    adds_class: bool

    def stored_name(self, name: str) -> str:
        """Return the name in the archive of an image that is called `name` in the listing."""
        return self.prefix + (name.partition("/")[2] if self.adds_class else name)

    def select(self, wanted: np.ndarray) -> "Members":
        """Return where some of the images lie: those that `wanted` [images] marks."""
        arrays = {name: getattr(self, name)[wanted] for name in ("archive_ids", "offsets", "sizes")}
        return replace(self, **arrays)

    def read(self, index: int, name: str) -> bytes:
        """Return the bytes of an image, which is called `name` in the listing.

        Raises:
            LocalError: The archive is not the one that was listed any more, or is gone.
            OSError: The disk can't read it.
        """
        archive = self.archives[self.archive_ids[index]]
        offset, size, stored = int(self.offsets[index]), int(self.sizes[index]), self.stored_name(name)
        try:
            data = os.pread(open_archive(archive), tar.BLOCK + size, offset - tar.BLOCK)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            data = b""  # a network file system's way to say that another machine replaced the file
        if len(data) < tar.BLOCK + size or not tar.header_fits(data[: tar.BLOCK], os.fsencode(stored), size):
            raise LocalError(
                f"{archive} has changed since it was listed: it holds something else where {stored} was. Leave the "
                "archives alone while they are read, and start again (training: with --resume auto)"
            )
        return data[tar.BLOCK :]


class MemberPath:
    """Path of an image in an archive, which can be used where a Path of an image file can.

    As text it is archive/name, as if the archive were a folder.
    """

    __slots__ = ("_index", "_members", "_name")

    def __init__(self, members: Members, index: int, name: str) -> None:
        """Set up the path.

        Args:
            members: The images of a listing.
            index: Number of the image in the listing.
            name: Its name there, <class>/<file>.
        """
        self._members, self._index, self._name = members, index, name

    def __str__(self) -> str:
        """Return archive/name."""
        return f"{self.archive}/{self._members.stored_name(self._name)}"

    @property
    def archive(self) -> Path:
        """Return the path of its archive."""
        return Path(self._members.archives[self._members.archive_ids[self._index]])

    @property
    def name(self) -> str:
        """Return the file's name without any folder."""
        return posixpath.basename(self._name)

    @property
    def stem(self) -> str:
        """Return the file's name without its folders and its ending."""
        return PurePosixPath(self._name).stem

    def relative_to(self, root: object) -> PurePosixPath:
        """Return <class>/<file>: relative to the split's folder for which the archives stand, whatever `root` is."""
        return PurePosixPath(self._name)

    def read_bytes(self) -> bytes:
        """Return the file's content; raises what Members.read raises."""
        return self._members.read(self._index, self._name)


ImagePath = Path | MemberPath  # of an image file, which may lie in an archive

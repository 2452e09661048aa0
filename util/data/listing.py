"""List the files of a folder of classes.

The list is held as arrays rather than a list of a million strings: loader processes share arrays, while counting
references to strings copies them page by page.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Listing:
    """Read-only sequence of (path, class number), in order of class, folder and name.

    Attributes:
        root: Folder that the paths in `names` are relative to; the sequence's items include it.
        names: The paths, one after the other, as bytes.
        ends: Where in `names` each path ends [files].
        targets: Class numbers [files].
    """

    root: str
    names: np.ndarray
    ends: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str, int]:
        start = self.ends[index - 1] if index else 0
        name = self.names[start : self.ends[index]].tobytes()
        return os.path.join(self.root, os.fsdecode(name)), int(self.targets[index])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        # Plain bytes and integers: indexing arrays a million times would take seconds.
        names, start = self.names.tobytes(), 0
        for end, target in zip(self.ends.tolist(), self.targets.tolist(), strict=True):
            yield os.path.join(self.root, os.fsdecode(names[start:end])), target
            start = end


def list_files(root: str, class_to_idx: dict[str, int], is_wanted: Callable[[str], bool]) -> Listing:
    """List the wanted files of all class folders and their subfolders, except hidden ones.

    Args:
        root: Folder that holds the class folders.
        class_to_idx: Number of each class, by the name of its folder; the name "" stands for root itself.
        is_wanted: Tells from a file's name whether to list it.

    Returns:
        The files in order of class, folder and name.
    """
    root = os.path.abspath(root)
    paths, targets = [], []
    for class_name, target in class_to_idx.items():
        for subfolder, files in walk(os.path.join(root, class_name)):
            folder = os.path.join(class_name, subfolder) if subfolder else class_name
            wanted_paths = [os.fsencode(os.path.join(folder, file)) for file in files if is_wanted(file)]
            paths += wanted_paths
            targets += [target] * len(wanted_paths)
    ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
    return Listing(root, np.frombuffer(b"".join(paths), dtype=np.uint8), ends, np.array(targets, np.int32))


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a root, relative to it, with the names of its files, both in sorted order.

    The root itself comes first, as "". Symbolic links are followed, hidden folders are left out.
    """
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        relative = os.path.relpath(folder, root)
        relative = "" if relative == "." else relative
        if f"{os.sep}." not in f"{os.sep}{relative}":
            yield relative, sorted(files)

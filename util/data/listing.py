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
    """(path, class) by number, in order of class, folder and name.

    Attributes:
        root: Folder that the paths are relative to.
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
        names, start = self.names.tobytes(), 0
        for end, target in zip(self.ends.tolist(), self.targets.tolist(), strict=True):
            yield os.path.join(self.root, os.fsdecode(names[start:end])), target
            start = end


def list_files(root: str, class_to_idx: dict[str, int], wanted: Callable[[str], bool]) -> Listing:
    """List the files of root/<class>/** whose names are wanted."""
    root = os.path.abspath(root)
    names, targets = [], []
    for name, target in class_to_idx.items():
        for inside, files in walk(os.path.join(root, name)):
            relative = os.path.join(name, inside) if inside else name
            found = [os.fsencode(os.path.join(relative, file)) for file in files if wanted(file)]
            names += found
            targets += [target] * len(found)
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return Listing(root, np.frombuffer(b"".join(names), dtype=np.uint8), ends, np.array(targets, np.int32))


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its files' names) in order, the folder relative to root ("": root itself).

    Links are followed, hidden folders left out.
    """
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        relative = os.path.relpath(folder, root)
        relative = "" if relative == "." else relative
        if f"{os.sep}." not in f"{os.sep}{relative}":
            yield relative, sorted(files)

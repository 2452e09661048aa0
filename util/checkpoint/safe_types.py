"""Types other than tensors that checkpoints may hold: plain data, whose loading can't run code of the file's choice.

Each is the type itself, or (type, name) where files of other versions know it by another name.
"""

import argparse
import collections
import datetime
import pathlib
import pickle
import re

import numpy as np
from packaging.version import Version
from torch.torch_version import TorchVersion

_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
_DATES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)
# Also the factories of defaultdicts. Not bytes and range, by which a short file could ask for any amount of memory.
_BUILTINS = (dict, list, set, frozenset, int, float, bool, str, slice)
# The types of an array's elements that are plain numbers, texts and dates; not objects, nor records that hold some.
_PLAIN_DTYPE = re.compile(r"[biufc]\d+|[SU]\d+|[mM]8")


class _Dtype:
    """The type of an array's elements, in place of numpy.dtype, which takes a file's word for what it is.

    numpy.dtype's __setstate__ lets a file declare numbers of its own to be Python objects, at addresses of its choice.
    """

    def __init__(self, code: str, *_: object) -> None:
        if not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")  # as torch names what it refuses
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Set the unit of dates and the byte order; the rest of the state is ignored."""
        if self.dtype.kind in "mM":
            _, (unit, count, *_) = state[8]
            unit = unit.decode() if isinstance(unit, bytes) else unit
            self.dtype = np.dtype(f"{self.dtype.kind}8[{int(count)}{unit}]")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array of plain numbers, texts or dates, in place of numpy.ndarray and of the function that rebuilds one."""

    def __new__(cls, *_: object) -> "_Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: tuple) -> None:
        """Set shape, type and content."""
        _, shape, kind, is_fortran, content = state
        super().__setstate__((1, shape, kind.dtype, bool(is_fortran), content))


def _scalar(kind: _Dtype, content: bytes) -> np.generic:
    """Return a scalar of numpy's."""
    return np.frombuffer(content, kind.dtype, count=1)[0] if kind.dtype.itemsize else kind.dtype.type()


def _dictionary(*_: object) -> dict:
    """Return an empty dictionary instead of a defaultdict, which torch.load can't fill."""
    return collections.OrderedDict()


SAFE_TYPES = [
    argparse.Namespace,  # the reference's flags
    (_dictionary, "collections.defaultdict"),
    *_BUILTINS,
    *_DATES,
    *_PATHS,
    *((kind, f"pathlib._local.{kind.__name__}") for kind in _PATHS),  # Python 3.13
    TorchVersion,
    Version,
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]

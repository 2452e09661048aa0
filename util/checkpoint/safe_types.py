"""Types other than tensors that checkpoints may hold: plain data, whose loading can't run code of the file's choice.

Each is the type itself, or (type, name) where files of other versions know it by another name.
"""

import argparse
import collections
import datetime
import pathlib

import numpy as np
from packaging.version import Version
from torch.torch_version import TorchVersion

_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
_DATES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)
# Also the factories of defaultdicts. Not bytes and range, by which a short file could ask for any amount of memory.
_BUILTINS = (dict, list, set, frozenset, int, float, bool, str, slice)
# Types of arrays; not ObjectDType, whose elements may be anything.
_DTYPES = [
    kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name not in ("ObjectDType", "DType")
]
_SCALAR = np.float64(0).__reduce__()[0]  # the functions that rebuild numpy's scalars and arrays
_ARRAY = np.zeros(1).__reduce__()[0]


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
    np.ndarray,
    np.dtype,
    *_DTYPES,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]

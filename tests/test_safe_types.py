"""Types in a checkpoint beside its tensors: plain ones are loaded, and what could run code is refused."""

import argparse
import builtins
import collections
import datetime
import pathlib
import textwrap

import numpy as np
import pytest
import torch
from packaging.version import Version

from util.checkpoint.files import load_checkpoint
from util.errors import UserError


@pytest.mark.parametrize(
    "value",
    [
        np.float64(81.2),
        np.int64(3),
        np.arange(4.0),
        np.array(["a", "b"]),
        np.random.RandomState(0).get_state(),
        pathlib.PurePosixPath("/x"),
        pathlib.Path("/x"),
        datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        datetime.timedelta(seconds=3),
        Version("2.1"),
        torch.__version__,
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(a=1),
        frozenset({1}),
        argparse.Namespace(output_dir=pathlib.Path("/x"), lr=np.float32(1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_types_beside_the_weights_are_loaded(value, encoder, tmp_path):
    torch.save({"model": encoder, "extra": value}, tmp_path / "file.pth")
    loaded = load_checkpoint(str(tmp_path / "file.pth"))
    assert torch.equal(loaded["model"]["cls_token"], encoder["cls_token"])


@pytest.mark.parametrize("value", [np.float64(81.2), np.arange(4.0)], ids=lambda value: type(value).__name__)
def test_numbers_that_numpy_1_stored_are_loaded(value, encoder, tmp_path):
    torch.save({"model": encoder, "extra": value}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "file.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path / "file.pth").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(load_checkpoint(str(tmp_path / "file.pth"))["model"]["cls_token"], encoder["cls_token"])


@pytest.mark.parametrize(
    ("content", "named"), [({"colour": 1, "size": 2}, ", but colour, size. Pass"), ([1], "er. Pass")]
)
def test_what_a_file_without_weights_holds_is_named(content, named, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"it holds no weights of a Vision Transform.*{named}"):
        load_checkpoint(str(tmp_path / "file.pth"))


class Custom:
    """A type of the user's own program."""


class Module:
    """What a whole model is to torch.save, as some programs store it."""

    def __init__(self, state):
        self.state, self.by = state, Custom()

    def state_dict(self):
        return self.state


class Marked:
    """Object that creates a file when it is unpickled in the ordinary way, by some function."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("function", ["eval", "exec", "getattr", "open"])
def test_nothing_that_could_run_code_is_loaded(function, encoder, tmp_path):
    marker = tmp_path / "marker"
    arguments = {
        "eval": (f"open({str(marker)!r}, 'w')",),
        "exec": (f"open({str(marker)!r}, 'w')",),
        "getattr": (pathlib.Path(marker), "touch"),
        "open": (str(marker), "w"),
    }[function]
    torch.save({"model": encoder, "x": Marked(getattr(builtins, function), *arguments)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=rf"refused: it holds \S*{function}, and"):
        load_checkpoint(str(tmp_path / "file.pth"))
    assert not marker.exists()


@pytest.mark.parametrize("content", [1, Custom()])
def test_arrays_of_objects_are_refused(content, encoder, tmp_path):
    torch.save({"model": encoder, "x": np.array([content], dtype=object)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file.pth is refused: it holds numpy.dtype\('O8'\), and"):
        load_checkpoint(str(tmp_path / "file.pth"))


class Record:
    """Type of an array's elements whose state declares their eight bytes to be a Python object."""

    def __init__(self, code, *state):
        self.parts = np.dtype, (code, False, True), *state

    def __reduce__(self):
        return self.parts


def test_an_array_that_declares_its_bytes_to_be_an_object_is_refused(encoder, tmp_path):
    """With numpy's own types, torch.load would follow the address that the file chose."""
    kind = Record("V8", (4, "|", None, ("f0",), {"f0": (Record("O8"), 0)}, 8, 1, 0))
    rebuild, arguments = np.zeros(1).__reduce__()[:2]
    forged = Marked(rebuild, *arguments)
    forged.parts = *forged.parts, (1, (1,), kind, False, b"A" * 8)
    torch.save({"model": encoder, "x": forged}, tmp_path / "file.pth", pickle_protocol=2)
    with pytest.raises(UserError, match=r"file.pth is refused: it holds numpy.dtype\('V8'\), and"):
        load_checkpoint(str(tmp_path / "file.pth"))


def test_arrays_of_numbers_texts_and_dates_are_loaded(encoder, tmp_path):
    arrays = {
        "numbers": np.arange(6, dtype=">i4").reshape(2, 3),
        "turned": np.asfortranarray(np.eye(2, 3)),
        "texts": np.array(["cat", "dog"]),
        "days": np.array(["2024-01-01", "NaT"], "M8[D]"),
        "a time": np.timedelta64(15, "m"),
        "a truth": np.bool_(True),
    }
    torch.save({"model": encoder, "args": arrays, "job": "pretrain"}, tmp_path / "file.pth")
    loaded = load_checkpoint(str(tmp_path / "file.pth"))["args"]
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array, equal_nan=array.dtype.kind in "mM"), name
        assert loaded[name].dtype == array.dtype.newbyteorder("="), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "extra": Custom()},
        lambda s: {"weights of mine": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "by": Custom()}},
        lambda s: s | {"extra": Custom()},
        lambda s: {"model": Module(s), "ema": None, "by": Custom()},
        lambda s: {"model": {**s, "_extra_state": Custom()}},
        lambda s: {"checkpoint": {"net": s, "by": Custom()}, "by": Custom()},
        lambda s: {"state_dict": {f"model.{name}": value for name, value in s.items()}, "callbacks": {"a": Custom()}},
    ],
)
def test_the_lines_that_a_refusal_names_save_the_weights(wrap, encoder, tmp_path):
    """Follow the message to its end: run its two lines, and pass the file that they write."""
    file = tmp_path / "refused.pth"
    torch.save(wrap(encoder), file)
    with pytest.raises(UserError, match=r"refused: it holds test_safe_types.(Custom|Module)") as refusal:
        load_checkpoint(str(file))
    exec(textwrap.dedent("\n".join(str(refusal.value).splitlines()[1:])), {})
    loaded = load_checkpoint(str(tmp_path / "refused-weights.pth"))
    assert all(torch.equal(loaded["model"][name], value) for name, value in encoder.items())

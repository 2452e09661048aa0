"""Weights & Biases: what a run writes there, offline; without the package or a login nothing is begun."""

import json
import os
import struct
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import job_argv, log, wait_for

import main_pretrain
from util import misc
from util.report import boards

FLAGS = ("--num_workers", 0, "--wandb", "lab/mae")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No account, no network: nothing that the machine's user has configured counts."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def records(file):
    """Read the records of an offline run: a log of LevelDB's form, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def content(folder):
    """Return the ids of a folder's offline runs, in their order, the first one's flags, and the rows of all of them."""
    ids, flags, rows = [], {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                ids.append(f"{record.run.entity}/{record.run.project}/{record.run.run_id}")
                flags = flags or {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = [("/".join([item.key, *item.nested_key]), item.value_json) for item in record.history.item]
                rows.append({key.strip("/"): json.loads(value) for key, value in items})
    return ids, flags, rows


SLOW = "import faults, main_pretrain; faults.slow_steps(0.05); faults.errors.run(main_pretrain.main)"


@pytest.mark.slow  # two processes
def test_a_run_goes_on_there_after_a_stop_and_is_the_same_otherwise(images, undisturbed, tmp_path):
    """Both parts are real processes, since wandb ends its run as Python exits."""
    pytest.importorskip("wandb")
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [str(word) for word in job_argv(images, tmp_path, *FLAGS, "--resume", "auto")]
    with (tmp_path / "out").open("w") as out:
        stopped = subprocess.Popen([sys.executable, "-c", SLOW, *argv], env=env, stdout=out, stderr=out)
        wait_for(tmp_path / "out", r"epoch 1/\d+ \[1/")
        stopped.terminate()
        assert stopped.wait(60) == 143, (tmp_path / "out").read_text()
    done = subprocess.run(
        [sys.executable, "main_pretrain.py", *argv], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids, flags, rows = content(tmp_path)
    assert len(ids) == 2 and len(set(ids)) == 1 and ids[0].startswith("lab/mae/")
    assert (flags["model"], flags["accum_iter"], flags["wandb"]) == ("mae_vit_demo_patch4", 2, "lab/mae")

    # Both parts' training is there, and the figures and the picture of the end.
    losses = {row["epoch"]: row["train_loss"] for row in rows if "train_loss" in row}
    assert list(losses) == [0, 0.9, 1, 1.9, 2, 2.9] and losses[2.9] < losses[0]
    assert [row["epoch"] for row in rows if "perf/test_loss" in row] == [2]
    assert [row["epoch"] for row in rows if "reconstructions/_type" in row] == [2]
    # It is the same run as without (to the last bits: these processes are not forked from the one of the other run).
    for epoch, line in log(undisturbed / "pretrain").items():
        assert log(tmp_path)[epoch] == pytest.approx(line, rel=1e-3)


def test_a_run_that_begins_anew_is_a_new_one_there(tmp_path):
    keeper = misc.Checkpoints(str(tmp_path), "pretrain", None, None, None, {"overwrite": True})
    (tmp_path / boards.WANDB_ID).write_text("abc")
    keeper.prepare(str(tmp_path / "checkpoint-last.pth"))
    assert (tmp_path / boards.WANDB_ID).read_text() == "abc"
    keeper.prepare("")
    assert not (tmp_path / boards.WANDB_ID).exists()


def test_without_the_package_nothing_begins(images, tmp_path, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = [str(word) for word in job_argv(images, tmp_path, *FLAGS)]
    assert "--wandb needs the package wandb: pip install wandb" in refusal(lambda: main_pretrain.main(argv))


def test_without_a_login_the_message_says_how(images, tmp_path, refusal):
    pytest.importorskip("wandb")
    argv = [str(word) for word in job_argv(images, tmp_path, *FLAGS)]
    message = refusal(lambda: main_pretrain.main(argv))
    assert "--wandb: Weights & Biases can't open a run" in message and "WANDB_MODE=offline" in message

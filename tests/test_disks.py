"""Output folders: whatever stops a run, its files are valid and complete, and nothing is logged twice."""

import os
import re
import shutil
import signal
import subprocess
import sys

import faults
import pytest
import torch
from conftest import ROOT
from runs import EVERY_STEP, assert_same_end, finish, job_argv, log, state, wait_for

from util import lock
from util.checkpoint import files

LATER = [("kill_while_writing", 1), *(("kill_after_rename", n) for n in range(4, 8))]
WRITING = [
    ("kill_while_writing", 4),
    ("kill_after_rename", 3),
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in LATER),
]


@pytest.mark.parametrize("fault", WRITING)
def test_killed_while_a_checkpoint_is_written(fault, images, undisturbed, tmp_path):
    argv = job_argv(images, tmp_path, *EVERY_STEP, "--num_workers", 0)
    process = faults.start("pretrain", argv, tmp_path / "out", fault)
    assert faults.exit_code(process) == -signal.SIGKILL
    finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_checkpoint_before(images, undisturbed, tmp_path):
    process = faults.start(
        "pretrain", job_argv(images, tmp_path, "--num_workers", 0), tmp_path / "out", ("fill_disk", 2)
    )
    assert faults.exit_code(process) == 2
    said = (tmp_path / "out").read_text()
    assert "cannot write" in said and "File too large" in said and "Traceback" not in said, said
    assert state(tmp_path, "0")["epoch"] == 0 and not list(tmp_path.glob("*.tmp"))
    finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")


def test_what_a_signals_handler_raises_amid_saving_is_not_hidden_by_the_saving(tmp_path, monkeypatch):
    """torch raises the death of a loader process wherever Python is; torch.save then fails at closing its file, too."""

    write, calls = files._NotingErrors.write, []

    def interrupted(self, data):
        calls.append(data)
        if len(calls) == 2:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
        return write(self, data)

    monkeypatch.setattr(files._NotingErrors, "write", interrupted)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        files.write_checkpoint({"model": torch.ones(1000)}, [tmp_path / "checkpoint-0.pth"])
    assert not list(tmp_path.iterdir())


@pytest.mark.tmpfs
def test_a_disk_that_fills_up(images, undisturbed, tmp_path):
    """The run has a file system of its own with room for two checkpoints of 16 MB, but not for four."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        process = faults.start("pretrain", job_argv(images, small, "--num_workers", 0), tmp_path / "out")
        assert faults.exit_code(process) == 2
        said = (tmp_path / "out").read_text()
        assert "cannot write" in said and "No space left on device" in said and "Traceback" not in said, said
        assert state(small, "0")["epoch"] == 0 and not list(small.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=500m", small], check=True)
        finish(images, small, "--num_workers", 0)
        assert_same_end(small, undisturbed / "pretrain")
    finally:
        subprocess.run(["umount", small], check=True)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, empty, flip_bit])
def test_auto_passes_over_a_spoilt_checkpoint_and_a_path_does_not(spoil, images, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "pretrain", run)
    for name in ("2", "last"):
        spoil(run / f"checkpoint-{name}.pth")
    for name in ("2", "last"):
        argv = job_argv(images, run, "--num_workers", 0, "--resume", run / f"checkpoint-{name}.pth")
        process = faults.start("pretrain", argv, tmp_path / "out")
        assert faults.exit_code(process) == 2
        said = (tmp_path / "out").read_text()
        assert f"checkpoint-{name}.pth is " in said and "--resume auto" in said and "Traceback" not in said
    said = finish(images, run, "--num_workers", 0)
    assert said.count("warning: skipped") == 2 and "checkpoint-1.pth is the newest valid checkpoint" in said
    assert_same_end(run, undisturbed / "pretrain")


def test_tensorboard_shows_no_step_twice(images, tmp_path):
    """A run killed after points that no checkpoint covers writes them again; they and the evaluations appear once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = job_argv(images, tmp_path, "--num_workers", 0, "--save_freq", 2, "--epochs", 4, job="finetune")
    process = faults.start("finetune", argv, tmp_path / "out")
    wait_for(tmp_path / "out", r"epoch 3/\d+ \[1/")
    process.kill()
    process.join()
    finish(images, tmp_path, "--num_workers", 0, "--save_freq", 2, "--epochs", 4, job="finetune")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    steps = [event.step for event in board.Scalars("loss")]
    assert steps == sorted(set(steps)) and steps == [1000 * e + s for e in range(4) for s in (0, 800)]
    assert [event.step for event in board.Scalars("perf/test_acc1")] == [0, 1000, 2000, 3000]
    assert all(event.value > 0 for event in board.Scalars("speed/tflops"))
    log(tmp_path)


def test_an_epoch_is_logged_once_though_killed_between_its_line_and_its_checkpoint(images, undisturbed, tmp_path):
    """The checkpoint then says that all images of the epoch are done, but the epoch is not over."""
    argv = job_argv(images, tmp_path, "--num_workers", 0, *EVERY_STEP, job="finetune")
    process = faults.start("finetune", argv, tmp_path / "out", ("kill_after_log_line", 2))
    assert faults.exit_code(process) == -signal.SIGKILL
    assert len(log(tmp_path)) == 2 and state(tmp_path)["epoch"] == 0 and state(tmp_path)["position"]["images"] == 80
    finish(images, tmp_path, "--num_workers", 0, job="finetune")
    assert_same_end(tmp_path, undisturbed / "finetune")


def test_a_folder_in_use_is_refused_until_its_run_is_gone(images, tmp_path):
    first = faults.start("pretrain", job_argv(images, tmp_path, "--num_workers", 2, "--epochs", 300), tmp_path / "out")
    wait_for(tmp_path / "out", r"epoch 1/\d+ \[10/10\]")
    second = faults.start("pretrain", job_argv(images, tmp_path, "--resume", "auto"), tmp_path / "second")
    assert faults.exit_code(second) == 2
    assert f"in use by another run, process {first.pid} on" in (tmp_path / "second").read_text()
    first.kill()  # its loader processes outlive it for seconds, and must not keep the lock
    first.join()
    third = faults.start(
        "pretrain", job_argv(images, tmp_path, "--resume", "auto", "--epochs", 300), tmp_path / "third"
    )
    wait_for(tmp_path / "third", "resuming from")
    third.kill()
    third.join()


HOLDER = """
import sys
from util import lock
from util.checkpoint import files

lock.lock_folder(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_the_holder_of_a_folder_is_named(tmp_path):
    """For a run on another machine the message says how to remove a lock that a file server has kept after a crash."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert re.fullmatch(rf"process {holder.pid} on \S+", lock.lock_folder(tmp_path))
        (tmp_path / ".lock").write_text("process 1 on elsewhere")
        assert lock.lock_folder(tmp_path) == (
            f"process 1 on elsewhere; if that machine is down, remove {tmp_path / '.lock'}"
        )
        holder.kill()
        holder.wait()
        assert lock.lock_folder(tmp_path) == ""


def test_a_run_that_goes_back_goes_on_from_there(images, undisturbed, tmp_path):
    """Even if it is killed before its first checkpoint, it does not resume from the folder's later checkpoints."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "pretrain", run)
    argv = job_argv(images, run, "--num_workers", 0, "--resume", run / "checkpoint-0.pth")
    process = faults.start("pretrain", argv, tmp_path / "out", ("slow_steps", 3))
    wait_for(tmp_path / "out", "of them trained")
    while state(run)["epoch"] != 0 and process.is_alive():  # within the first step, of 3 seconds
        process.join(0.05)
    process.kill()
    assert faults.exit_code(process) == -signal.SIGKILL
    assert "checkpoint-last.pth is the newest" in finish(images, run, "--num_workers", 0)
    assert_same_end(run, undisturbed / "pretrain")


def test_a_fresh_start_puts_an_old_log_aside_and_only_overwrite_removes_it(images, tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    (tmp_path / "events.out.tfevents.1").write_text("kept")
    said = finish(images, tmp_path, "--num_workers", 0, "--epochs", 2)
    (aside,) = tmp_path.glob("log-*.txt")
    assert f"the log of the run before is {aside} now" in said
    assert aside.read_text() == '{"epoch": 0}\n' and (tmp_path / "events.out.tfevents.1").exists()
    process = faults.start(
        "pretrain", job_argv(images, tmp_path, "--num_workers", 0, "--epochs", 2, "--overwrite"), tmp_path / "out"
    )
    assert (
        faults.exit_code(process) == 0 and not (tmp_path / "events.out.tfevents.1").exists() and len(log(tmp_path)) == 2
    )

"""What a run leaves on the disk is whole, and each thing there once, whatever stops it."""

import os
import shutil
import signal
import subprocess

import faults
import pytest
from runs import EVERY_STEP, assert_same_end, finish, log, state, wait_for, words

WRITING = [("half_written", 1), ("half_written", 4), *(("after_rename", n) for n in range(3, 8))]


@pytest.mark.parametrize("fault", WRITING)
def test_killed_while_a_checkpoint_is_written(fault, images, undisturbed, tmp_path):
    argv = words(images, tmp_path, *EVERY_STEP, "--num_workers", 0)
    process = faults.start("pretrain", argv, tmp_path / "out", fault)
    assert faults.ended(process) == -signal.SIGKILL
    finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_checkpoint_before(images, undisturbed, tmp_path):
    process = faults.start("pretrain", words(images, tmp_path, "--num_workers", 0), tmp_path / "out", ("full_disk", 2))
    assert faults.ended(process) == 2
    said = (tmp_path / "out").read_text()
    assert "cannot write" in said and "File too large" in said and "Traceback" not in said, said
    assert state(tmp_path, "0")["epoch"] == 0 and not list(tmp_path.glob("*.tmp"))
    finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")


@pytest.mark.tmpfs
def test_a_disk_that_fills_up(images, undisturbed, tmp_path):
    """On a file system of its own that holds two checkpoints of 16 MB and not four."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        process = faults.start("pretrain", words(images, folder, "--num_workers", 0), tmp_path / "out")
        assert faults.ended(process) == 2
        said = (tmp_path / "out").read_text()
        assert "cannot write" in said and "No space left on device" in said and "Traceback" not in said, said
        assert state(folder, "0")["epoch"] == 0 and not list(folder.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=500m", folder], check=True)
        finish(images, folder, "--num_workers", 0)
        assert_same_end(folder, undisturbed / "pretrain")
    finally:
        subprocess.run(["umount", folder], check=True)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, empty, flip])
def test_auto_passes_over_a_spoilt_checkpoint_and_a_path_does_not(spoil, images, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "pretrain", folder)
    for name in ("2", "last"):
        spoil(folder / f"checkpoint-{name}.pth")
    for name in ("2", "last"):
        argv = words(images, folder, "--num_workers", 0, "--resume", folder / f"checkpoint-{name}.pth")
        process = faults.start("pretrain", argv, tmp_path / "out")
        assert faults.ended(process) == 2
        said = (tmp_path / "out").read_text()
        assert f"checkpoint-{name}.pth is " in said and "--resume auto" in said and "Traceback" not in said
    said = finish(images, folder, "--num_workers", 0)
    assert said.count("warning: passed over") == 2 and "checkpoint-1.pth is the newest checkpoint that is whole" in said
    assert_same_end(folder, undisturbed / "pretrain")


def test_tensorboard_shows_no_step_twice(images, tmp_path):
    """Killed after points that no checkpoint remembers; the evaluation's points come once, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = words(images, tmp_path, "--num_workers", 0, "--save_freq", 2, "--epochs", 4, job="finetune")
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
    log(tmp_path)


def test_an_epoch_is_logged_once_though_killed_between_its_line_and_its_checkpoint(images, undisturbed, tmp_path):
    """The checkpoint then says: all of the epoch's images are used, but it is not over."""
    argv = words(images, tmp_path, "--num_workers", 0, *EVERY_STEP, job="finetune")
    process = faults.start("finetune", argv, tmp_path / "out", ("killed_after_a_line", 2))
    assert faults.ended(process) == -signal.SIGKILL
    assert len(log(tmp_path)) == 2 and state(tmp_path)["epoch"] == 0 and state(tmp_path)["position"]["images"] == 80
    finish(images, tmp_path, "--num_workers", 0, job="finetune")
    assert_same_end(tmp_path, undisturbed / "finetune")


def test_a_folder_in_use_is_refused_until_its_run_is_gone(images, tmp_path):
    first = faults.start("pretrain", words(images, tmp_path, "--num_workers", 2, "--epochs", 300), tmp_path / "out")
    wait_for(tmp_path / "out", r"epoch 1/\d+ \[10/10\]")
    second = faults.start("pretrain", words(images, tmp_path, "--resume", "auto"), tmp_path / "second")
    assert faults.ended(second) == 2
    assert f"in use by another run, process {first.pid} on" in (tmp_path / "second").read_text()
    first.kill()  # its loader processes outlive it for seconds, and must not keep the folder
    first.join()
    third = faults.start("pretrain", words(images, tmp_path, "--resume", "auto", "--epochs", 300), tmp_path / "third")
    wait_for(tmp_path / "third", "going on from")
    third.kill()
    third.join()

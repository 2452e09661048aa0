"""Interruptions: whatever stops a run, it resumes where it was and ends with the same bits."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from runs import EVERY_STEP, assert_same_end, finish, job_argv, log, state, wait_for

import main_linprobe
import main_pretrain
from util.data.loaders import EpochSampler
from util.distributed import signals


@pytest.mark.parametrize(
    "job", ["pretrain", *(pytest.param(job, marks=pytest.mark.slow) for job in ("finetune", "linprobe"))]
)
def test_killed_at_random_moments(job, images, undisturbed, tmp_path):
    """Runs that save after every update are killed ten times in all, and then finish."""
    chance = random.Random(job)
    for _ in range({"pretrain": 6, "finetune": 2, "linprobe": 2}[job]):
        more = [*EVERY_STEP, "--num_workers", chance.choice([0, 2]), "--resume", "auto"]
        process = faults.start(job, job_argv(images, tmp_path, *more, job=job), tmp_path / "out")
        wait_for(tmp_path / "out", r"epoch \d+ \[|trained")
        process.join(chance.uniform(0, 0.6))
        process.kill()
        assert faults.exit_code(process) in (-signal.SIGKILL, 0)
    finish(images, tmp_path, "--num_workers", 2, job=job)
    assert_same_end(tmp_path, undisturbed / job)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_mid_epoch_saves_and_stops(sent, code, images, undisturbed, tmp_path):
    """The run saves one checkpoint, exits with the signal's code, and resumes with another number of workers."""
    argv = job_argv(images, tmp_path, "--num_workers", 2)
    process = faults.start("pretrain", argv, tmp_path / "out", ("slow_steps", 0.1))
    wait_for(tmp_path / "out", r"epoch 1/\d+ \[1/")
    os.kill(process.pid, getattr(signal, sent))
    assert faults.exit_code(process) == code, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert f"stopped by {sent} in epoch 1" in said and "checkpoint-last.pth" in said and "Traceback" not in said
    stopped = state(tmp_path)
    assert stopped["epoch"] == 0 and 0 < stopped["position"]["images"] < 80
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-last.pth"]
    assert "resuming from" in finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (("fail", "MemoryError", 25), 2, "out of the computer's memory"),
        (("fail", "KeyError", 25), 1, "a fault of the test"),  # a bug, which ends in a traceback
        (("fail_monitor", "OSError", 0), 1, "a fault of the test"),
        (("lose_images", 0, 200), 2, "100 images in a row cannot be read"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_error_ends_a_run_only_after_saving(fault, code, message, images, undisturbed, tmp_path):
    """What was trained is saved, and without the fault the run resumes and ends with the same bits."""
    argv = job_argv(images, tmp_path, "--num_workers", 0, "--save_freq", 100)
    process = faults.start("pretrain", argv, tmp_path / "out", fault)
    assert faults.exit_code(process) == code, (tmp_path / "out").read_text()
    assert message in (tmp_path / "out").read_text()
    stopped = state(tmp_path)
    assert stopped["epoch"] == 1 and stopped["position"]["images"] > 0, "nothing of the last epoch was saved"
    finish(images, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")


def test_an_error_leaves_a_probes_statistics_at_its_last_update(images, tmp_path, monkeypatch):
    """BatchNorm has seen a batch of an update that was not made: the run that is resumed sees it again."""
    calls, losses = [0], main_linprobe.head_losses

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 8:  # in the second epoch of five batches, of which two make an update
            raise MemoryError("a fault of the test")
        return losses(*args, **kwargs)

    flags = "--num_workers", 0, "--accum_iter", 2
    main_linprobe.main(list(map(str, job_argv(images, tmp_path / "undisturbed", *flags, job="linprobe"))))
    argv = list(map(str, job_argv(images, tmp_path / "run", *flags, job="linprobe")))
    monkeypatch.setattr(main_linprobe, "head_losses", failing)
    with pytest.raises(MemoryError):
        main_linprobe.main(argv)
    monkeypatch.undo()
    assert state(tmp_path / "run")["position"]["images"] == 32
    main_linprobe.main([*argv, "--resume", "auto"])
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


def on_two_ranks(images, folder, *more, fault=(), job="pretrain"):
    """Run a job on two ranks, five updates an epoch in pre-training; return their exit codes."""
    argv = job_argv(images, folder, "--num_workers", 0, "--save_freq", 100, "--accum_iter", 1, *more, job=job)
    folder.mkdir(exist_ok=True)
    processes = faults.start_ranks(job, argv, folder / "out", fault)
    return [faults.exit_code(process) for process in processes]


@pytest.fixture(scope="module")
def two_undisturbed_ranks(images, tmp_path_factory):
    """Folder of a run on two ranks, to compare with."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    assert on_two_ranks(images, folder, "--monitor_freq", 0) == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("rank", "loaded", "done"),  # what the rank loads, of 40 images an epoch; images of both ranks in the second epoch
    [
        *((0, [60], 32), (1, [60], 32)),  # within the epoch
        *((1, [40], 0), (1, [75], 64)),  # at its first batch, and at its last
        (1, [60, 52], 32),  # with SIGTERM in the batch before: all ranks are to save just then
    ],
)
def test_a_rank_that_loses_its_images_stops_all_after_saving(
    rank, loaded, done, images, two_undisturbed_ranks, tmp_path
):
    flags = ["--monitor_freq", 0]
    assert on_two_ranks(images, tmp_path / "run", *flags, fault=("lose_images", rank, *loaded)) == [2, 2]
    said = (tmp_path / "run" / "out-0").read_text()
    assert "100 images in a row cannot be read" in said and "Traceback" not in said and "not finite" not in said
    assert (state(tmp_path / "run")["epoch"], state(tmp_path / "run")["position"]["images"]) == (0, done)

    # Updates without that rank's images have left no trace.
    assert on_two_ranks(images, tmp_path / "run", *flags, "--resume", "auto") == [0, 0]
    assert_same_end(tmp_path / "run", two_undisturbed_ranks)


def test_an_update_that_is_half_made_is_not_saved(images, tmp_path, monkeypatch, capsys):
    """An error between two parameter groups, as a loader process's death may raise it at any moment."""
    module = importlib.import_module("torch.optim.adam")
    calls, adam = [0], module.adam

    def failing(*args, **kwargs):
        adam(*args, **kwargs)
        calls[0] += 1
        if calls[0] == 5:  # the first group of the third update
            raise RuntimeError("a fault of the test")

    monkeypatch.setattr(module, "adam", failing)
    argv = job_argv(images, tmp_path, "--num_workers", 0, "--monitor_freq", 0)
    with pytest.raises(RuntimeError, match="a fault of the test"):
        main_pretrain.main(list(map(str, argv)))
    assert "an update was only half made, and is not saved" in capsys.readouterr().out
    assert calls[0] == 5 and not list(tmp_path.glob("checkpoint-*"))


def test_a_hangup_is_ignored_under_nohup(images, tmp_path):
    argv = job_argv(images, tmp_path, "--num_workers", 0)
    process = faults.start("pretrain", argv, tmp_path / "out", ("ignore_hangups",))
    wait_for(tmp_path / "out", r"epoch 0/\d+ \[1/")
    os.kill(process.pid, signal.SIGHUP)
    assert faults.exit_code(process) == 0
    assert "trained 3 epochs" in (tmp_path / "out").read_text()


def test_two_signals_end_at_once(images, tmp_path):
    argv = job_argv(images, tmp_path, "--num_workers", 0)
    process = faults.start("pretrain", argv, tmp_path / "out", ("slow_steps", 3))
    wait_for(tmp_path / "out", "of them trained")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    start = time.time()
    os.kill(process.pid, signal.SIGTERM)
    assert faults.exit_code(process) in (-signal.SIGTERM, 143) and time.time() - start < 1
    assert not list(tmp_path.glob("checkpoint-*.pth"))


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK"])
def test_a_launchers_echo_of_a_signal_is_not_a_second_one(launcher, monkeypatch):
    """SLURM sends SIGTERM twice when a job's time is up, some milliseconds apart."""
    monkeypatch.setenv(launcher, "1")
    ended = []
    with signals.Requests(save_minutes=0) as requests:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.005)
        assert requests.poll() == (signal.SIGTERM, False, False)

        # A later one ends the process: here it finds a handler instead of the system's.
        monkeypatch.setattr(signals.os, "kill", lambda pid, signum: ended.append((pid, signum)))
        monkeypatch.setattr(signals.time, "monotonic", lambda: requests.signalled + signals.ECHO_S + 1)
        signal.raise_signal(signal.SIGTERM)
        assert ended == [(os.getpid(), signal.SIGTERM)]


def test_a_signal_to_the_whole_process_group_leaves_the_loader_alive_to_save(images, undisturbed, tmp_path, script):
    """A terminal's Ctrl-C and some schedulers signal the loader processes, too."""
    argv = job_argv(images, tmp_path, "--num_workers", 2, "--epochs", 300)
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "main_pretrain.py", *map(str, argv)],
            cwd=Path(__file__).parent.parent,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    wait_for(tmp_path / "out", r"epoch 0/\d+ \[10/10\]")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    assert "saved" in (tmp_path / "out").read_text() and "Traceback" not in (tmp_path / "out").read_text()
    assert not _processes_of(process.pid), "orphans"


def _processes_of(group: int) -> list[int]:
    time.sleep(0.5)
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def test_two_ranks_agree_on_where_to_stop(images, tmp_path):
    """After SIGTERM to one rank both save and exit with 143; resumed, they end as an undisturbed pair does."""
    pair = ["--accum_iter", "1", "--num_workers", "0"]
    for name, fault in (("whole", ()), ("cut", ("slow_steps", 0.1))):
        (tmp_path / name).mkdir()
        argv, out = job_argv(images, tmp_path / name, *pair), tmp_path / name / "out"
        processes = faults.start_ranks("pretrain", argv, out, fault)
        if fault:
            wait_for(tmp_path / name / "out-0", r"epoch 1/\d+ \[1/")
            os.kill(processes[1].pid, signal.SIGTERM)
        codes = [faults.exit_code(process) for process in processes]
        assert codes == ([143, 143] if fault else [0, 0]), (tmp_path / name / "out-1").read_text()
    assert 0 < state(tmp_path / "cut")["position"]["images"] < 80 and len(state(tmp_path / "cut")["rng"]) == 2
    again = faults.start_ranks(
        "pretrain", job_argv(images, tmp_path / "cut", *pair, "--resume", "auto"), tmp_path / "cut" / "out"
    )
    assert [faults.exit_code(process) for process in again] == [0, 0], (tmp_path / "cut" / "out-0").read_text()
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("first", [0, 7])
def test_nan_on_one_rank_changes_nothing_and_stops_both(first, images, tmp_path):
    argv = job_argv(
        images, tmp_path, "--accum_iter", "1", "--num_workers", "0", "--epochs", "50", "--max_bad_steps", "3"
    )
    start = time.time()
    processes = faults.start_ranks("pretrain", argv, tmp_path / "out", ("nan_loss", 1, first))
    assert [faults.exit_code(process, 60) for process in processes] == [1, 1] and time.time() - start < 60
    said = (tmp_path / "out-0").read_text()
    assert "loss was not finite on rank 1" in said and "--max_bad_steps 3 in a row" in said, said
    assert f"from step {first % 5} on" in said and "Traceback" not in said
    if first:
        assert "newest checkpoint: " + str(tmp_path / "checkpoint-0.pth") in said
        assert all(torch.isfinite(value).all() for value in state(tmp_path)["model"].values())
    else:
        assert not list(tmp_path.glob("checkpoint-*.pth")) and "none was written yet" in said


def test_a_killed_loader_process_ends_the_run_with_a_message(images, tmp_path):
    argv = job_argv(images, tmp_path, "--num_workers", 2, "--epochs", 300)
    process = faults.start("pretrain", argv, tmp_path / "out")
    wait_for(tmp_path / "out", r"epoch 0/\d+ \[10/10\]")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    assert faults.exit_code(process, 60) == 1
    said = (tmp_path / "out").read_text()
    assert "A loader process died" in said and "--resume auto" in said and "Traceback" not in said, said
    assert not Path(f"/proc/{children[1]}").exists(), "an orphan"


DYING = """
import os, pathlib, sys
import engine_pretrain, main_pretrain
from util import errors, loop
marker, after = pathlib.Path(sys.argv[1]), loop.Run.after_update

def dying(self, step, skipped):
    after(self, step, skipped)
    if self.position.epoch == 1 and step == 2 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)

loop.Run.after_update = dying
errors.run(lambda: main_pretrain.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_rank_comes_back_under_torchrun(images, tmp_path, script):
    (tmp_path / "dying.py").write_text(DYING)
    pair = ["--accum_iter", "1", "--num_workers", "0", "--resume", "auto"]
    whole = faults.start_ranks("pretrain", job_argv(images, tmp_path / "whole", *pair), tmp_path / "out")
    done = script(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "--max-restarts",
        1,
        tmp_path / "dying.py",
        tmp_path / "marker",
        *job_argv(images, tmp_path / "cut", *pair),
        PYTHONPATH=".",
        OMP_NUM_THREADS="1",
    )
    assert [faults.exit_code(process) for process in whole] == [0, 0]
    assert done.returncode == 0 and (tmp_path / "marker").exists(), done.stderr[-3000:]
    assert "resuming from" in done.stdout
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


def test_another_number_of_ranks_keeps_schedule_and_images(images, tmp_path, monkeypatch):
    """A run that changes between one and two ranks in mid-epoch uses every image of the epoch once."""

    def order(world, batch_size, first_step):
        parts = []
        for rank in range(world):
            monkeypatch.setattr("util.distributed.dist.world_size", lambda: world)
            monkeypatch.setattr("util.distributed.dist.rank", lambda rank=rank: rank)
            sampler = EpochSampler(83, batch_size, seed=0)
            sampler.set_epoch(1, first_step)
            parts.append([index for _, index in sampler])
        assert len({len(part) for part in parts}) == 1
        return [set().union(*(part[k : k + batch_size] for part in parts)) for k in range(0, len(parts[0]), batch_size)]

    assert order(1, 16, 0) == order(2, 8, 0) == order(4, 4, 0) and len(set().union(*order(1, 16, 0))) == 80
    assert order(2, 8, 0) == order(1, 16, 0)[:2] + order(2, 8, 2) == order(2, 8, 0)[:3] + order(1, 16, 3)
    monkeypatch.undo()

    (tmp_path / "whole").mkdir()
    finish(images, tmp_path / "whole", "--batch_size", 16, "--accum_iter", 1, "--num_workers", 0)
    undisturbed_rates = _rates(tmp_path / "whole")
    one, two = ["--batch_size", "16", "--accum_iter", "1"], ["--batch_size", "8", "--accum_iter", "1"]
    for name, before, after in (("shrink", two, one), ("grow", one, two)):
        folder = tmp_path / name
        folder.mkdir()
        start, go_on = (faults.start_ranks, _alone) if name == "shrink" else (_alone, faults.start_ranks)
        argv = job_argv(images, folder, *before, "--num_workers", 0)
        processes = start("pretrain", argv, folder / "a", ("slow_steps", 0.1))
        wait_for(folder / ("a-0" if name == "shrink" else "a"), r"epoch 1/\d+ \[1/")
        os.kill(processes[0].pid, signal.SIGTERM)
        assert {faults.exit_code(process) for process in processes} == {143}
        at = state(folder)["position"]["images"]
        assert 0 < at < 80 and at % 16 == 0
        argv = job_argv(images, folder, *after, "--num_workers", 0, "--resume", "auto")
        processes = go_on("pretrain", argv, folder / "b")
        assert {faults.exit_code(process) for process in processes} == {0}
        said = (folder / ("b" if name == "shrink" else "b-0")).read_text()
        assert f"(epoch 1, {at} images done)" in said and state(folder)["optimizer"]["state"][0]["step"] == 15
        assert _rates(folder) == pytest.approx(undisturbed_rates, rel=1e-6)


def _alone(*args):
    return [faults.start(*args)]


def _rates(folder):
    return [line["train_lr"] for line in log(folder).values()]

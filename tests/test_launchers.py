"""Detection of the launcher, and submitit's jobs."""

import json
import os
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch
from conftest import ROOT
from runs import assert_same_end, job_argv

import main_pretrain
import main_submitit
from util import checks, resources
from util.distributed import launchers
from util.errors import UserError

SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node1",
}


@pytest.fixture
def no_launcher(monkeypatch):
    """Remove all launchers' environment variables, and afterwards those that the test has set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "SUBMITIT_", "MASTER_")) or "RANK" in name or "WORLD_SIZE" in name:
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield monkeypatch
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_sruns_variables_make_the_group(no_launcher):
    for name, value in SRUN.items():
        no_launcher.setenv(name, value)
    assert launchers.set_torchrun_env() == []
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert found == ["9", "11", "1", "3", "node1"]


def test_a_batch_script_without_srun_is_one_process(no_launcher):
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        no_launcher.setenv(name, SRUN[name])
    no_launcher.setenv("SLURM_NTASKS", "8")
    assert launchers.set_torchrun_env() == [] and "WORLD_SIZE" not in os.environ
    assert launchers.notices() == [
        "SLURM gave this job 8 tasks, and this process is alone: put srun before python to start them all"
    ]
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert launchers.notices() == []


def test_submitits_own_processes_within_srun_are_a_group(no_launcher):
    mine = {"GLOBALID": "1", "NTASKS": "2", "LOCALID": "1", "JOB_ID": "5"}
    for name, value in {**SRUN, **{f"SUBMITIT_LOCAL_{name}": value for name, value in mine.items()}}.items():
        no_launcher.setenv(name, value)
    assert launchers.set_torchrun_env() == [] and os.environ["RANK"] == "1" and os.environ["WORLD_SIZE"] == "2"


def test_every_process_says_that_the_machine_has_too_few_gpus(no_launcher):
    no_launcher.setattr(torch.cuda, "is_available", lambda: True)
    no_launcher.setattr(torch.cuda, "device_count", lambda: 2)
    no_launcher.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        no_launcher.setenv("LOCAL_RANK", str(rank))
        assert "need 4 GPU(s), one each, and it has 2" in checks.device_problems("cuda")[0]
    no_launcher.setattr(torch.cuda, "device_count", lambda: 4)
    assert checks.device_problems("cuda") == []
    assert "the 4 processes of this machine take a GPU each" in checks.device_problems("cuda:0")[0]
    no_launcher.setattr(torch.cuda, "device_count", lambda: 1)
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "4")  # srun, which shows each process a GPU of its own
    assert checks.device_problems("cuda") == [] and launchers.gpu_index(1) == 0


def test_torchrun_within_srun_decides(no_launcher):
    for name, value in {**SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        no_launcher.setenv(name, value)
    assert launchers.set_torchrun_env() == [] and os.environ["RANK"] == "3"


def test_open_mpis_variables_need_the_flag(no_launcher):
    for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")):
        no_launcher.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert launchers.set_torchrun_env() == [] and "RANK" not in os.environ
    assert launchers.set_torchrun_env(dist_on_itp=True) == []
    assert os.environ["RANK"] == "1" and os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_ranks_without_an_address_to_meet_at_are_told(no_launcher):
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    assert (
        launchers.set_torchrun_env() == [launchers.NO_HOST]
        and launchers.set_torchrun_env(dist_url="tcp://node1:1") == []
    )
    no_launcher.setenv("MASTER_ADDR", "node1")
    assert launchers.set_torchrun_env() == [] and os.environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize(
    ("rank", "world"), [("x", "2"), ("0", "x"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "-2"), ("0", "")]
)
def test_ranks_that_are_none_are_a_message(rank, world, no_launcher):
    no_launcher.setenv("RANK", rank)
    no_launcher.setenv("WORLD_SIZE", world)
    no_launcher.setenv("MASTER_ADDR", "node1")
    assert f"RANK='{rank}', WORLD_SIZE='{world}': these must be" in launchers.rank_problems()[0]


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_local_rank_that_is_none_is_said(name, no_launcher, images, refusal):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", name: "x"}.items():
        no_launcher.setenv(variable, value)
    argv = ["--data_path", str(images), "--output_dir", "", "--device", "cpu"]
    assert f"RANK='0', WORLD_SIZE='1', {name}='x': these must be" in refusal(lambda: main_pretrain.main(argv))


def test_empty_variables_of_slurm_are_no_numbers(no_launcher):
    for name, value in {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "", "SLURM_CPUS_ON_NODE": ""}.items():
        no_launcher.setenv(name, value)
    assert launchers.set_torchrun_env() == [] and os.environ["LOCAL_WORLD_SIZE"] == "1"
    no_launcher.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert resources.cores() == 16


def test_torchruns_processes_do_not_have_a_gpu_each_in_a_task_of_srun(no_launcher):
    for name, value in {**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        no_launcher.setenv(name, value)
    assert launchers.gpu_index(1) == 0
    no_launcher.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launchers.gpu_index(1) == 1 and launchers.gpus_needed(1) == 2


def test_a_world_size_without_a_rank_is_a_message(no_launcher):
    no_launcher.setenv("WORLD_SIZE", "8")
    assert "WORLD_SIZE is 8, and RANK is not set" in launchers.set_torchrun_env()[0]
    no_launcher.setenv("MASTER_ADDR", "node1")
    assert "WORLD_SIZE is 8, and RANK is not set" in launchers.set_torchrun_env()[0]
    no_launcher.setenv("WORLD_SIZE", "1")
    assert launchers.set_torchrun_env() == []


def test_the_cores_of_a_node_are_shared_out_once(no_launcher):
    no_launcher.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    no_launcher.setenv("LOCAL_WORLD_SIZE", "4")
    assert resources.cores() == 4  # under torchrun every process may use all cores
    no_launcher.setenv("SLURM_CPUS_ON_NODE", "64")
    assert resources.cores() == 16  # srun has bound each task to cores of its own
    no_launcher.setenv("SLURM_CPUS_ON_NODE", "8")
    assert resources.cores() == 2  # no binding, and the job has only half of the node


def submission(images, folder, *more, job="pretrain", executor="local", tasks=2):
    own = [job, "--job_dir", folder, "--executor", executor, "--ngpus", 0, "--tasks", tasks, "--timeout", 60]
    return list(map(str, [*own, "--", *job_argv(images, folder, *more, job=job)]))


def submit(*args, **more):
    return subprocess.Popen(
        [sys.executable, "main_submitit.py", *submission(*args, **more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def submit_refused(no_launcher, refusal):
    """Function that submits in this process a job that is refused; it returns the message."""
    no_launcher.setenv("PYTHONPATH", "")  # the launcher extends it
    return lambda *args, **more: refusal(lambda: main_submitit.main(submission(*args, **more)))


@pytest.mark.slow
def test_submitit_runs_two_processes_here_and_goes_on_after_its_signal(images, tmp_path):
    """After the signal for the end of SLURM's time the run saves, is queued again, and ends with the same bits."""
    pair = ["--batch_size", 4, "--num_workers", 0, "--epochs", 6]
    faults.run_ranks("pretrain", job_argv(images, tmp_path / "whole", *pair), tmp_path)
    job = submit(images, tmp_path / "job", *pair)
    log = tmp_path / "job" / "log.txt"
    end = time.time() + 120
    while not log.exists() and time.time() < end and job.poll() is None:
        time.sleep(0.05)
    for pid in subprocess.run(["pgrep", "-f", f"_submit {tmp_path}"], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGUSR2)
    said = job.communicate(timeout=180)[0]
    logs = "\n".join(path.read_text() for path in (tmp_path / "job" / "submitit").glob("*_log.*"))
    assert job.returncode == 0, said + logs[-3000:]
    assert "stopped by SIGUSR2" in logs and "resuming from" in logs
    assert_same_end(tmp_path / "job", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--epochs", 0], "--epochs 0 must be at least 1"),
        (["--no_such_flag"], "unknown flag --no_such_flag"),
        (["--resume", "x.pth"], "omit the flag, or start from a checkpoint's encoder with --init"),
        (["--overwrite"], "choose another --job_dir"),
    ],
)
def test_submitit_says_at_once_what_is_wrong_with_the_jobs_flags(flags, expected, images, tmp_path, submit_refused):
    assert expected in submit_refused(images, tmp_path / "job", *flags)
    assert not (tmp_path / "job").exists()


def test_gpus_that_the_local_executor_would_not_take_are_refused(tmp_path, monkeypatch):
    args = main_submitit.get_args(["pretrain", "--job_dir", str(tmp_path), "--executor", "local", "--ngpus", "2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=4,5: --executor local takes GPUs 0,1"):
        main_submitit.executor(args)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    main_submitit.executor(args)
    args.ngpus = 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="--ngpus 3: this machine has 2; pass --ngpus 2$"):
        main_submitit.executor(args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="this machine has 0; pass --ngpus 0, for the CPU"):
        main_submitit.executor(args)


@pytest.mark.slow
def test_submitits_debug_runs_in_this_process(images, tmp_path):
    job = submit(images, tmp_path, "--epochs", 2, executor="debug", tasks=1)
    assert "trained 2 epochs" in job.communicate(timeout=120)[0] and job.returncode == 0
    assert len([json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]) == 2


def test_without_slurm_the_message_names_the_other_executors(images, tmp_path, monkeypatch, submit_refused):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "--executor local" in submit_refused(images, tmp_path / "job", executor="slurm")


def test_the_jobs_flags_need_no_separator():
    """The published commands have the flags of launcher and job side by side."""
    own = ["pretrain", "--job_dir", "JOB", "--nodes", "8", "--use_volta32"]
    flags = ["--batch_size", "64", "--model", "mae_vit_large_patch16", "--norm_pix_loss", "--data_path", "DIR"]
    mixed = main_submitit.get_args([*own[:3], *flags, *own[3:]])
    assert mixed.flags == flags and mixed.job == "pretrain" and mixed.nodes == 8 and mixed.use_volta32
    assert main_submitit.get_args([*own, "--", *flags]) == mixed


def test_a_job_that_would_only_save_and_queue_is_refused(images, tmp_path, submit_refused, refusal):
    argv = [arg if arg != "60" else "4" for arg in submission(images, tmp_path / "job", executor="slurm")]
    assert "--timeout 4 must be at least 5" in refusal(lambda: main_submitit.main(argv))


def test_without_submitit_its_name_is_told(images, tmp_path, monkeypatch, submit_refused):
    monkeypatch.setattr(main_submitit, "submitit", None)
    assert "main_submitit.py needs submitit: pip install submitit" in submit_refused(images, tmp_path / "job")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Function that takes what SLURM's commands do, as a line of shell, and puts such commands into the path."""

    def install(line):
        (tmp_path / "bin").mkdir()
        for name in ("srun", "sbatch"):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return install


def test_sbatchs_refusal_is_a_message(images, tmp_path, slurm, submit_refused):
    slurm("echo invalid partition specified: typo >&2; exit 1")
    assert "invalid partition specified: typo" in submit_refused(images, tmp_path / "job", executor="slurm")


def test_sbatchs_options_are_written_once_and_by_either_name(images, tmp_path, slurm, no_launcher, submit_refused):
    no_launcher.setenv("PYTHONPATH", "")  # the launcher extends it
    slurm("echo Submitted batch job 7")
    job, *flags = submission(images, tmp_path / "job", executor="slurm")
    main_submitit.main([job, "--slurm", "job-name=mine", "mem_per_cpu=2G", *flags])
    lines = (tmp_path / "job" / "submitit" / "7_submission.sh").read_text().splitlines()
    assert [line for line in lines if "job-name" in line] == ["#SBATCH --job-name=mine"]
    assert "#SBATCH --mem-per-cpu=2G" in lines
    refused = {"cpus-per-task=2": "--slurm cpus-per-task: use --cpus", "=5": "--slurm =5: needs KEY=VALUE"}
    for option, said in refused.items():
        argv = ["pretrain", "--job_dir", str(tmp_path), "--slurm", option, "--", "--data_path", str(images)]
        with pytest.raises(UserError, match=said):
            main_submitit.executor(main_submitit.get_args(argv))


def test_the_batch_script_gives_the_cores_to_srun_too(images, tmp_path, slurm, no_launcher):
    no_launcher.setenv("PYTHONPATH", "")  # the launcher extends it
    slurm("echo Submitted batch job 7")
    job, *flags = submission(images, tmp_path / "job", executor="slurm")
    main_submitit.main([job, "--cpus", "3", "--use_volta32", "--comment", "a run", *flags])
    script = tmp_path / "job" / "submitit" / "7_submission.sh"
    lines = script.read_text().splitlines()
    assert {"#SBATCH --cpus-per-task=3", "#SBATCH --constraint=volta32gb"} <= set(lines)
    assert any(line.startswith("#SBATCH --comment=") and "a run" in line for line in lines)
    assert any(line.startswith("srun ") and " --cpus-per-task=3 " in line for line in lines)

"""A real SLURM on this machine (tests/slurm.sh): srun, main_submitit.py, and jobs that are queued again.

To run as root, with Debian's packages slurmctld, slurmd, slurm-client and munge: pytest -m slurm
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import faults
import pytest
from conftest import ROOT
from runs import FLAGS, assert_same_end, job_argv, wait_for

pytestmark = pytest.mark.slurm
PAIR = ["--batch_size", 4, "--num_workers", 0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name, path=SBIN)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurmctld, slurmd, slurm-client, munge; missing: {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # munge requires a path that only root can write to and everyone can search
    subprocess.run([ROOT / "tests" / "slurm.sh", "start", folder], check=True, timeout=120)
    yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1"}
    subprocess.run([ROOT / "tests" / "slurm.sh", "stop", folder], check=True)


SBIN = f"{os.environ['PATH']}:/usr/sbin"


def run(cluster, *argv, timeout=300):
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def submit(cluster, job, folder, *flags):
    """Submit through main_submitit.py and return the job's number."""
    own = ["main_submitit.py", job, "--job_dir", folder, "--ngpus", 0, "--tasks", 2, "--cpus", 1, "--timeout", 60]
    return re.search(r"job (\d+):", run(cluster, sys.executable, *own, "--partition", "all", "--", *flags))[1]


def output(folder):
    return "\n".join(path.read_text() for path in sorted((folder / "submitit").glob("*_log.*")))


def wait(cluster, job, folder, timeout=240):
    """Wait until the job has completed; fail if it ends in another state."""
    end = time.time() + timeout
    while time.time() < end:
        state = re.search(r"JobState=(\w+)", run(cluster, "scontrol", "show", "job", job))[1]
        if state == "COMPLETED":
            return
        assert state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), state + output(folder)[-3000:]
        time.sleep(0.5)
    raise TimeoutError(state + output(folder)[-3000:])


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """Output folder of a run on two ranks without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    faults.run_ranks("pretrain", job_argv(images, folder, *PAIR, "--epochs", 40), folder)
    return folder


def probe_flags(images, pretrained):
    return [*FLAGS["linprobe"].split(), *PAIR, "--data_path", images, "--finetune", pretrained, "--dist_eval"]


@pytest.mark.parametrize("launcher", ["srun", "submitit"])
def test_slurm_pretrains_probes_and_evaluates(launcher, cluster, images, undisturbed, tmp_path):
    """Two tasks are two ranks, whose parameters are those of two ranks started without SLURM."""
    pretrain, probe = tmp_path / "pretrain", tmp_path / "probe"
    flags = job_argv(images, pretrain, *PAIR, "--epochs", 40)
    srun = ["srun", "--ntasks", 2, sys.executable]
    if launcher == "srun":
        run(cluster, *srun, "main_pretrain.py", *flags)
    else:
        wait(cluster, submit(cluster, "pretrain", pretrain, *flags), pretrain)
    assert_same_end(pretrain, undisturbed)
    flags = probe_flags(images, pretrain / "checkpoint-39.pth")
    if launcher == "srun":
        said = run(cluster, *srun, "main_linprobe.py", *flags, "--output_dir", probe)
    else:
        wait(cluster, submit(cluster, "linprobe", probe, *flags), probe)
        said = output(probe)
    line = [line for line in said.splitlines() if line.startswith("* Acc@1")][-1]
    evaluate = [*flags[: flags.index("--finetune")], "--dist_eval", "--eval", "--resume", probe / "checkpoint-1.pth"]
    if launcher == "srun":
        said = run(cluster, *srun, "main_linprobe.py", *evaluate)
    else:
        wait(cluster, submit(cluster, "linprobe", tmp_path / "evaluation", *evaluate), tmp_path / "evaluation")
        said = output(tmp_path / "evaluation")
    assert said.splitlines().count(line) == 1


@pytest.mark.parametrize("grace", [False, True])
def test_a_preempted_job_goes_on_and_ends_with_the_same_bits(grace, cluster, images, undisturbed, tmp_path):
    """`scontrol requeue` does the same as preemption without a grace period: SIGTERM, and the job is queued again."""
    job = submit(cluster, "pretrain", tmp_path, *job_argv(images, tmp_path, *PAIR, "--epochs", 40))
    wait_for(tmp_path / "log.txt", '"epoch": 2')
    if grace:
        run(cluster, "sbatch", "--partition", "urgent", "--cpus-per-task", 2, "--output", "/dev/null", "--wrap", "true")
    else:
        run(cluster, "scontrol", "requeue", job)
    wait(cluster, job, tmp_path)
    said = output(tmp_path)
    assert "stopped by SIGTERM" in said and "resuming from" in said
    assert ("this job is preempted: waiting for SLURM" in said) == grace
    assert_same_end(tmp_path, undisturbed)


def test_a_job_whose_time_is_nearly_up_saves_and_is_queued_again(cluster, images, undisturbed, tmp_path):
    """SLURM's --signal sends SIGUSR2 to every task some time before the limit."""
    job = submit(cluster, "pretrain", tmp_path, *job_argv(images, tmp_path, *PAIR, "--epochs", 40))
    wait_for(tmp_path / "log.txt", '"epoch": 2')
    run(cluster, "scancel", "--signal=USR2", job)
    wait(cluster, job, tmp_path)
    said = output(tmp_path)
    assert "stopped by SIGUSR2" in said and "resuming from" in said
    assert_same_end(tmp_path, undisturbed)


def test_the_batch_script_of_the_documents_saves_when_its_time_is_up_and_goes_on(cluster, images, tmp_path):
    """At the limit SLURM sends SIGTERM twice, some milliseconds apart. Nothing else makes this run save."""
    line = re.search(
        r"^srun .*main_pretrain.py FLAGS --resume auto$", (ROOT / "docs/distributed.md").read_text(), re.M
    )[0]
    flags = job_argv(images, tmp_path / "run", *PAIR, "--epochs", 10**6, "--save_freq", 10**6, "--save_minutes", 0)
    script, said = tmp_path / "job.sh", tmp_path / "said"
    line = line.replace("python", sys.executable).replace("FLAGS", shlex.join(map(str, flags)))
    script.write_text(f"#!/bin/bash\n#SBATCH --ntasks=2 --cpus-per-task=1 --open-mode=append --output={said}\n{line}\n")

    # SLURM looks for jobs whose time is up twice a minute.
    job = run(cluster, "sbatch", "--parsable", "--time=1", script).strip()
    end = time.time() + 200
    while "JobState=TIMEOUT" not in run(cluster, "scontrol", "show", "job", job):
        assert time.time() < end, said.read_text()[-3000:]
        time.sleep(1)
    assert "stopped by SIGTERM" in said.read_text(), said.read_text()[-3000:]

    job = run(cluster, "sbatch", "--parsable", "--time=5", script).strip()
    wait_for(said, "resuming from .*checkpoint-last.pth")
    run(cluster, "scancel", job)

"""Who started this process, and among how many: other launchers' variables become torchrun's.

torchrun (any program that sets RANK and WORLD_SIZE) comes first, then mpirun (with --dist_on_itp), submitit on this
machine, within srun, too, and srun. Where none speaks, the process is alone.
"""

import os
import re
import subprocess

# torchrun's variables, in the launchers' own words.
OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
# srun's own for this step: in a batch script, outside srun, SLURM_NTASKS and SLURM_PROCID are there as well.
SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
SUBMITIT = {
    "RANK": "SUBMITIT_LOCAL_GLOBALID",
    "WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
    "LOCAL_RANK": "SUBMITIT_LOCAL_LOCALID",
    "LOCAL_WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
}

NO_HOST = "no host to meet at: export MASTER_ADDR, the first node's name (mpirun -x)"


def adopt(dist_on_itp: bool = False, dist_url: str = "env://") -> list[str]:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what the launcher says.

    What is set already stays. Returns what keeps the processes from finding each other, as messages.
    """
    env = os.environ
    if dist_on_itp:
        if not env.keys() >= set(OPEN_MPI.values()):
            return ["--dist_on_itp reads Open MPI's variables, and OMPI_COMM_WORLD_RANK is not set: use mpirun"]
        _take(OPEN_MPI)
    elif {"RANK", "WORLD_SIZE"} <= env.keys():
        env.setdefault("MASTER_PORT", "29500")
        return [] if env["WORLD_SIZE"] == "1" or "MASTER_ADDR" in env or dist_url != "env://" else [NO_HOST]
    elif env.keys() >= set(SUBMITIT.values()):
        _take(SUBMITIT)
    elif env.keys() >= set(SRUN.values()):
        _take(SRUN)
        env["LOCAL_WORLD_SIZE"] = str(_tasks_here())
    if int(env.get("WORLD_SIZE", 1)) == 1:
        return []
    if "MASTER_ADDR" in env:
        env.setdefault("MASTER_PORT", "29500")
        return []
    job = int(env.get("SLURM_JOB_ID", env.get("SUBMITIT_LOCAL_JOB_ID", 0))), int(env.get("SLURM_STEP_ID", 0))
    # Jobs on one node get ports of their own, below those that the system hands out.
    env.setdefault("MASTER_PORT", str(15000 + (job[0] * 101 + job[1]) % 17000))
    env["MASTER_ADDR"] = "127.0.0.1" if env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] else _first_host()
    return [] if env["MASTER_ADDR"] else [NO_HOST]


def _take(names: dict[str, str]) -> None:
    os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})


def _tasks_here() -> int:
    """This node's entry in SLURM_STEP_TASKS_PER_NODE, of the form 4(x2),3."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _first_host() -> str:
    """The first node of this SLURM step; "" where it can't be found out."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0] if done.returncode == 0 else ""


def cores() -> int:
    """The CPU cores that this process has for itself: its share, where the processes of a node share them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_the_job = int(os.environ.get("SLURM_CPUS_ON_NODE", here))
    if here < of_the_job:  # bound to its own by srun
        return here
    return max(1, min(here, of_the_job) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def gpu_index(gpus: int) -> int:
    """Which of the visible GPUs is this process's: the first where SLURM shows each task its own."""
    return 0 if _sees_its_own(gpus) else int(os.environ.get("LOCAL_RANK", 0))


def gpus_needed(gpus: int) -> int:
    """How many of them the processes of this machine take together, the same in each."""
    return 1 if _sees_its_own(gpus) else int(os.environ.get("LOCAL_WORLD_SIZE", 1 + gpu_index(gpus)))


def _sees_its_own(gpus: int) -> bool:
    return gpus == 1 and "SLURM_STEP_NUM_TASKS" in os.environ

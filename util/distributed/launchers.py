"""Launchers: detect which one started this process, and set torchrun's environment variables from its own.

The first that applies of these:
1. mpirun, with --dist_on_itp
2. torchrun, or any other program that sets RANK and WORLD_SIZE
3. submitit's local executor, also when it runs within srun
4. srun
Without any of them the process is alone.
"""

import os
import re
import subprocess

# torchrun's variables: those of other launchers that hold the same.
OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
SUBMITIT = {
    "RANK": "SUBMITIT_LOCAL_GLOBALID",
    "WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
    "LOCAL_RANK": "SUBMITIT_LOCAL_LOCALID",
    "LOCAL_WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
}
# Only srun sets SLURM_STEP_NUM_TASKS. SLURM_NTASKS and SLURM_PROCID are set in a batch script outside srun as well.
SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}

DEFAULT_PORT = "29500"  # torchrun's
NO_HOST = (
    "MASTER_ADDR, the host of the rendezvous, is not set: export it, the first node's name (mpirun -x MASTER_ADDR)"
)


def set_torchrun_env(dist_on_itp: bool = False, dist_url: str = "env://") -> list[str]:
    """Detect the launcher and set torchrun's environment variables.

    They are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and MASTER_ADDR and MASTER_PORT unless these are set.

    Args:
        dist_on_itp: Whether Open MPI's variables are read, and no others.
        dist_url: Rendezvous address; torchrun's processes need no MASTER_ADDR unless it is "env://".

    Returns:
        The problems that keep the processes from setting up a group, as messages.
    """
    # Ranks.
    env = os.environ
    if dist_on_itp:
        if not env.keys() >= set(OPEN_MPI.values()):
            return [
                "--dist_on_itp reads Open MPI's variables, and OMPI_COMM_WORLD_RANK is not set: start the processes "
                "with mpirun, or omit the flag"
            ]
        _copy_variables(OPEN_MPI)
    elif {"RANK", "WORLD_SIZE"} <= env.keys():
        env.setdefault("MASTER_PORT", DEFAULT_PORT)
        return [] if env["WORLD_SIZE"] == "1" or "MASTER_ADDR" in env or dist_url != "env://" else [NO_HOST]
    elif env.keys() >= set(SUBMITIT.values()):
        _copy_variables(SUBMITIT)
    elif env.keys() >= set(SRUN.values()):
        _copy_variables(SRUN)
        env["LOCAL_WORLD_SIZE"] = str(_tasks_on_this_node())
    elif env.get("WORLD_SIZE", "1") != "1":
        return [
            f"WORLD_SIZE is {env['WORLD_SIZE']}, and RANK is not set: start the processes with torchrun or srun, or "
            "unset WORLD_SIZE for a single one"
        ]

    # Rendezvous: what the user has set stays.
    if int(env.get("WORLD_SIZE", 1)) == 1:
        return []
    if "MASTER_ADDR" in env:
        env.setdefault("MASTER_PORT", DEFAULT_PORT)
        return []
    # Jobs on one node get ports of their own, below those that the system hands out.
    job, step = int(env.get("SLURM_JOB_ID", env.get("SUBMITIT_LOCAL_JOB_ID", 0))), int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(15000 + (job * 101 + step) % 17000))
    env["MASTER_ADDR"] = "127.0.0.1" if env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] else _first_host()
    return [] if env["MASTER_ADDR"] else [NO_HOST]


def rank_problems() -> list[str]:
    """Check the ranks that torchrun, or anyone else, has set; return a list with one message, or an empty one."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return []
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
    values = [os.environ[name] for name in names]
    if all(value.isdecimal() for value in values) and int(values[0]) < int(values[1]):
        return []
    stated = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
    return [
        f"{stated}: these must be whole numbers, RANK from 0 and below WORLD_SIZE; unset them for a single process, or "
        "start the processes with torchrun or srun"
    ]


def notices() -> list[str]:
    """Return what the user should know about how this process was started; call it after `set_torchrun_env`."""
    env = os.environ
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks in ("", "1") or "SLURM_STEP_NUM_TASKS" in env or "RANK" in env:
        return []
    return [f"SLURM gave this job {tasks} tasks, and this process is alone: put srun before python to start them all"]


def is_preempted() -> bool:
    """Return whether SLURM preempts this job, and queues it again if it still runs when its grace period is over."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    words = _scontrol("show", "job", os.environ["SLURM_JOB_ID"]).split()
    return "Requeue=1" in words and any(re.match(r"PreemptTime=\d", word) for word in words)


def restarts() -> bool:
    """Return whether the launcher may start, or has started, the same command again: torchrun, or SLURM's requeue."""
    env = os.environ
    return any(int(env.get(name) or 0) for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"))


def _copy_variables(names: dict[str, str]) -> None:
    os.environ.update({torchrun_name: os.environ[name] for torchrun_name, name in names.items()})


def _tasks_on_this_node() -> int:
    """Return this node's entry in SLURM_STEP_TASKS_PER_NODE, of the form 4(x2),3: two nodes of 4 tasks, one of 3."""
    tasks_of_nodes = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE") or "1"):
        tasks_of_nodes += [int(tasks)] * int(nodes or 1)
    return tasks_of_nodes[min(int(os.environ.get("SLURM_NODEID") or 0), len(tasks_of_nodes) - 1)]


def _first_host() -> str:
    """Return the name of the first node of this SLURM step, or "" where it can't be determined."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    return _scontrol("show", "hostnames", nodes).split("\n")[0]


def _scontrol(*words: str) -> str:
    """Return what SLURM's scontrol prints, or "" where there is none, or it fails."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_index(gpus: int) -> int:
    """Return the index of this process's GPU among the `gpus` visible ones.

    It is the local rank, but 0 where SLURM shows each task only its own GPU.
    """
    return 0 if _sees_only_its_own_gpu(gpus) else int(os.environ.get("LOCAL_RANK", 0))


def gpus_needed(gpus: int) -> int:
    """Return how many GPUs this machine's processes need to see, which can be more than the `gpus` visible ones.

    It is 1 where SLURM shows each task only its own GPU. With LOCAL_WORLD_SIZE the number is the same in each process,
    so that they agree on whether there are enough; without, it is the local rank + 1.
    """
    return 1 if _sees_only_its_own_gpu(gpus) else int(os.environ.get("LOCAL_WORLD_SIZE", 1 + gpu_index(gpus)))


def _sees_only_its_own_gpu(gpus: int) -> bool:
    """Return whether SLURM shows this process one GPU; torchrun's processes share those of a task."""
    return gpus == 1 and "SLURM_STEP_NUM_TASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ

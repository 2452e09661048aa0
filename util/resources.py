"""CPU cores and open files: how many this process may use."""

import os
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


def cores() -> int:
    """Return the number of CPU cores for this process alone: its share, where the processes of a node share them."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores_of_job = int(os.environ.get("SLURM_CPUS_ON_NODE") or visible)
    # If fewer cores are visible than the job has on this node, srun has already bound this process to its own.
    if visible < cores_of_job:
        return visible
    return max(1, min(visible, cores_of_job) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def open_files_needed(workers: int, tensors: int = 2) -> int:
    """Return about how many files this process and each of its loader processes will have open at once.

    The numbers added to the files that are open now were counted on Linux with torch 2.14, at most, and rounded up: 8
    for checkpoints, logs and an image; with several ranks 20, and 3 for each; with loader processes 8, and for each 7
    and the tensors of its 4 batches, which lie in shared memory and count as files, too. Training's and the
    validation's processes are there at once.

    Args:
        workers: Loader processes of one loader.
        tensors: Tensors of a batch.
    """
    listing = Path("/dev/fd")
    open_now = len(list(listing.iterdir())) if listing.is_dir() else 8
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return open_now + 8 + (8 + (7 + 4 * tensors) * workers if workers else 0) + (20 + 3 * ranks if ranks > 1 else 0)


def allow_open_files(needed: int) -> int:
    """Raise the number of files that this process may have open as far as the system allows, if it is below `needed`.

    Returns:
        The limit from now on.
    """
    if resource is None:
        return needed  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return needed
    if soft < needed:
        highest = needed if hard == resource.RLIM_INFINITY else hard
        with suppress(OSError, ValueError):  # macOS has a lower limit than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
    return soft

"""How a script ends when something is wrong: with one message and an exit code instead of a traceback.

2    the user can fix it: flags, data, checkpoint, a full disk or GPU
1    the run failed: gradients that are not finite, a loader process or another rank that died or does not answer; or
     the work was done, except for some inputs, which are named
143  stopped by SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP after saving; 130 by SIGINT
"""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from signal import SIGINT, SIGTERM

import torch
import torch.distributed

from util.console import tolerant_console
from util.distributed import dist, launchers

# System errors that mean: a file could not be written; or could not be written or read.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
DISK = (*FULL, *NAMES, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
# How gloo, NCCL and the store say that another process is gone.
PEERS = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|recvValue failed|[Tt]imed out|[Tt]imeout")
# How Python, torch and the linker say that a process, or the machine, has too many files open.
OPEN_FILES = re.compile(r"Too many open files|received \d+ items of ancdata")


class UserError(Exception):
    """Something that the user can fix; the message says what is wrong, where, and what to do.

    All ranks raise the same error, so that only local rank 0 of each machine prints the message.
    """

    def __init__(self, message: str) -> None:
        # An error that a loader process raised arrives with that process's traceback in front: keep the message only.
        if message.startswith("Caught "):
            message = re.split(r"util\.errors\.\w+: ", message)[-1].strip()
        super().__init__(message)


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError for all problems, each in a line of its own where there are several; none for []."""
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems))


class LocalError(UserError):
    """A UserError that may occur on one rank alone, so that every rank that raises it prints the message."""


class Incomplete(Exception):
    """Raised when work is done but some inputs, such as unreadable images, were left out; the message counts them."""


class Stopped(Exception):
    """The end of a run that was asked to stop by a signal, and has saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def run(main: Callable[[], object]) -> None:
    """Run a script's main function, and end the process with the message and exit code that fit how it went.

    After a success or a stop by signal, the process group is destroyed. A run that saved because SLURM preempts it does
    not end, but waits for SLURM to end it: a job that ends by itself in its grace period is not queued again.

    Args:
        main: The script; its result is ignored.

    Raises:
        SystemExit: With one of the exit codes above; after a success the function returns.
        Exception: An error that is foreseen nowhere, which is a bug, with its traceback.
    """
    code = 0
    with tolerant_console():
        try:
            main()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            code = _print_error(error)
            if getattr(error, "signum", 0) == SIGTERM and dist.run_on_rank0(launchers.is_preempted):
                _wait_to_be_killed()
    # After a failure the other ranks may be gone, and leaving the group in good order would wait for them.
    if torch.distributed.is_initialized() and code in (0, 130, 143):
        torch.distributed.destroy_process_group()
    if code:
        dist.exit_if_connecting(code)
        sys.exit(code)


def _wait_to_be_killed() -> None:
    """Wait until SLURM kills this process, whatever it asks for before."""
    dist.print_rank0("this job is preempted: waiting for SLURM to end it and to queue it again")
    signal.signal(SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def _print_error(error: Exception) -> int:
    """Print a foreseen error to stderr and return the exit code; raise any other error again."""
    description = _describe(error)
    if description is None:
        raise error
    message, code = description
    if _prints_on_this_rank(error):
        print(message, file=sys.stderr, flush=True)
    return code


def is_on_every_rank(error: Exception) -> bool:
    """Return whether all ranks raise this error alike: a UserError but a LocalError, or one of dist.run_on_rank0."""
    alike = isinstance(error, UserError) and not isinstance(error, LocalError)
    return alike or getattr(error, "on_every_rank", False)


def _prints_on_this_rank(error: Exception) -> bool:
    """Return whether this rank prints the error.

    Rank 0 prints Stopped; local rank 0 of each machine prints what all ranks raise alike, a UserError other than
    LocalError or an error of dist.run_on_rank0; each rank prints all others.
    """
    if isinstance(error, Stopped):
        return dist.rank() == 0
    if is_on_every_rank(error):
        # It may be raised before there is a process group, also because the rank is none.
        local_rank = os.environ.get("LOCAL_RANK", "0")
        return local_rank == "0" or not local_rank.isdecimal()
    return True


def _describe(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of an error that is foreseen, None of any other."""
    # Errors of this repository: they carry their message.
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, Stopped):
        return str(error), 130 if error.signum == SIGINT else 143
    if isinstance(error, FloatingPointError):
        return f"rank {dist.rank()} stops: {error}", 1
    if isinstance(error, (Incomplete, dist.RendezvousError)):
        return f"error: {error}", 1

    # Errors of torch and the system: the message adds the remedy.
    if isinstance(error, torch.OutOfMemoryError):
        problem = str(error).split(". ")[0]
        remedy = "Halve --batch_size and double --accum_iter, or add --grad_checkpoint"
        return f"error: rank {dist.rank()}: {problem}. {remedy}", 2
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or OPEN_FILES.search(str(error)):
        remedy = "Raise the limit (ulimit -n), or lower --num_workers"
        return f"error: rank {dist.rank()}: too many open files. {remedy}", 1
    if isinstance(error, OSError) and error.errno in DISK:
        file = error.filename or "to the output folder"
        if error.errno in FULL or not error.filename:
            return f"error: cannot write {file}: {error.strerror}. Make room there, or choose another folder", 2
        return f"error: cannot read or write {file}: {error.strerror}. Check its permissions, and the disk", 2
    if isinstance(error, MemoryError):
        return _memory_message(str(error).splitlines()[-1] if str(error) else ""), 2
    if isinstance(error, RuntimeError):
        return _describe_runtime_error(str(error))
    return None


def _describe_runtime_error(text: str) -> tuple[str, int] | None:
    """Return message and exit code for a RuntimeError that is recognised by its text, None for any other."""
    if refused := re.search(r"you tried to allocate (\d+) bytes", text):
        return _memory_message(f"{int(refused[1]) / 2**30:.1f} GiB more were asked for"), 2
    if "Symlink loop" in text:  # Path.resolve, before Python 3.13
        return f"error: {text}: its links lead in a circle; name another path", 2
    if re.search(r"shared memory(\(shm\)| limit)", text):
        return (
            "error: /dev/shm, through which loader processes send their batches, is full: lower --num_workers, or "
            "start the container with --ipc=host or --shm-size 16g"
        ), 2
    if "DataLoader worker" in text:
        return (
            f"error: {text}. A loader process died; out of memory is the usual reason: lower --num_workers. Resume "
            "from the newest checkpoint with --resume auto"
        ), 1
    if dist.world_size() > 1 and PEERS.search(text):
        return (
            f"error: rank {dist.rank()} lost another process, which ended, or did not answer in time (--dist_timeout); "
            "if it had time for a message, that says why (look at the other nodes' output, too). Resume from the "
            "newest checkpoint with --resume auto, which torchrun with --max-restarts does by itself. "
            f"Seen here: {text.splitlines()[0]}"
        ), 1
    return None


def _memory_message(detail: str) -> str:
    """Return the message for a computer, not a GPU, that has no memory left."""
    reason = f" ({detail})" if detail else ""
    return (
        f"error: rank {dist.rank()}: out of the computer's memory{reason}. Lower --batch_size or --num_workers, and "
        "give other programs less"
    )

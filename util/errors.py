"""How a script ends when something is wrong: one message and an exit code, not a traceback.

2    the user can put it right: flags, data, checkpoint, a full disk or GPU
1    the run failed: gradients that are not finite, a loader or another rank that died or does not answer
143  stopped by SIGTERM, SIGUSR1 or SIGUSR2 after saving; 130 by SIGINT
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from signal import SIGINT

import torch
import torch.distributed

from util.distributed import dist

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
# How gloo, NCCL and the store say that another process is gone.
PEERS = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|recvValue failed|[Tt]imed out|[Tt]imeout")


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, where, and what to do.

    Every rank meets it alike, so that one speaks for all.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # what a loader process raised comes back with its traceback in front
            message = re.split(r"util\.errors\.\w+: ", message)[-1].strip()
        super().__init__(message)


class LocalError(UserError):
    """A UserError that one rank meets alone: that rank says it."""


class Stopped(Exception):
    """The run was asked to stop, and has saved where it stands."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def _complain(error: Exception) -> int:
    """Say what happened, on stderr; returns the exit code. Raises the error again if it is a bug of ours."""
    text, code, speaks = f"error: {error}", 1, True
    if isinstance(error, UserError):
        code, speaks = 2, isinstance(error, LocalError) or os.environ.get("LOCAL_RANK", "0") == "0"
    elif isinstance(error, Stopped):
        text, code, speaks = str(error), 130 if error.signum == SIGINT else 143, dist.rank() == 0
    elif isinstance(error, FloatingPointError):
        text = f"rank {dist.rank()} stops: {error}"
    elif isinstance(error, torch.OutOfMemoryError):
        text, code = (
            f"error: rank {dist.rank()}: {str(error).split('. ')[0]}. Halve --batch_size and double "
            "--accum_iter, or add --grad_checkpoint",
            2,
        )
    elif isinstance(error, OSError) and error.errno in DISK:
        text, code = f"error: cannot write {error.filename or 'to the output folder'}: {error.strerror}", 2
    elif isinstance(error, RuntimeError) and re.search(r"shared memory(\(shm\)| limit)", str(error)):
        text, code = (
            "error: /dev/shm, through which loader processes send their batches, is full: lower "
            "--num_workers, or start the container with --ipc=host or --shm-size 16g",
            2,
        )
    elif isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        text += (
            ". A loader process died; out of memory is the usual reason: lower --num_workers. "
            "Resume from the newest checkpoint with --resume auto"
        )
    elif isinstance(error, dist.RendezvousError):
        pass
    elif isinstance(error, RuntimeError) and dist.world_size() > 1 and PEERS.search(str(error)):
        text = (
            f"error: rank {dist.rank()} lost another process: {str(error).splitlines()[0]}. Look for that one's own "
            "message; resume from the newest checkpoint with --resume auto"
        )
    else:
        raise error
    if speaks:
        print(text, file=sys.stderr, flush=True)
    return code


def run(main: Callable[[], object]) -> None:
    """Run a script's main(); whatever a user should read ends in one message and the exit code listed above."""
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = _complain(error)
    # After a failure the other ranks may be gone, and leaving the group in good order would wait for them.
    if torch.distributed.is_initialized() and code in (0, 130, 143):
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)

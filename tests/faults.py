"""Runs a script in a process of its own, with a fault built in where wanted: no fault lives in production code.

The processes are forked from a server that has imported everything, so that a start takes a fraction of a second.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import torch

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util import errors, misc
from util.checkpoint import files
from util.report import log

MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "linprobe": main_linprobe.main}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(save: int) -> None:
    """Killed when the save-th checkpoint is half written."""
    saves, write = [0], files._NotingErrors.write
    start = files._NotingErrors.__init__

    def counting(self, file):
        saves[0] += 1
        self.bytes = 0
        start(self, file)

    def dying(self, data):
        self.bytes += len(data)
        done = write(self, data)
        if saves[0] == save and self.bytes > 2_000_000:
            self.file.flush()
            _kill()
        return done

    files._NotingErrors.__init__, files._NotingErrors.write = counting, dying


def after_rename(number: int) -> None:
    """Killed right after the number-th rename of a checkpoint."""
    renames, rename = [0], os.replace

    def dying(source, target):
        rename(source, target)
        renames[0] += "checkpoint" in str(target)
        if renames[0] == number:
            _kill()

    os.replace = dying


def killed_after_a_line(number: int) -> None:
    """Killed right after the number-th line of log.txt."""
    lines, epoch = [0], log.RunLog.epoch

    def dying(self, values):
        epoch(self, values)
        lines[0] += 1
        if lines[0] == number:
            _kill()

    log.RunLog.epoch = dying


def full_disk(megabytes: float) -> None:
    """No file may grow beyond so many megabytes, from the second checkpoint on."""
    write = misc.write
    saves = [0]

    def limited(state, paths):
        saves[0] += 1
        if saves[0] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        write(state, paths)

    misc.write = limited


def nan_loss(rank: int, first: int) -> None:
    """From the first-th call on, rank's loss is not a number."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def poisoned(self, *args, **kwargs):
        loss, pred, mask = forward(self, *args, **kwargs)
        calls[0] += 1
        bad = calls[0] > first and int(os.environ.get("RANK", 0)) == rank
        return loss * float("nan") if bad else loss, pred, mask

    models_mae.MaskedAutoencoderViT.forward = poisoned


def slow_steps(seconds: float) -> None:
    """Every step takes so much longer: time to send a signal."""
    import time

    forward = models_mae.MaskedAutoencoderViT.forward

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return forward(self, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = slow


def hangs(rank: int, first: int) -> None:
    """From the first-th call on, rank does not come back."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def waiting(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] > first and int(os.environ["RANK"]) == rank:
            signal.pause()
        return forward(self, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = waiting


FAULTS = {
    f.__name__: f for f in (hangs, half_written, after_rename, killed_after_a_line, full_disk, nan_loss, slow_steps)
}


def _run(job: str, argv: list[str], out: str, env: dict[str, str], fault: tuple) -> None:
    with Path(out).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    torch.set_num_threads(1)
    if fault:
        FAULTS[fault[0]](*fault[1:])
    errors.run(lambda: MAINS[job](argv))


# The server of Python 3.11 imports what it preloads without the path that it is given.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def process(target, *args):
    """Start a process that runs a function of a module."""
    started = _context.Process(target=target, args=args)
    started.start()
    return started


def start(job: str, argv: list[str], out: Path, fault: tuple = (), env: dict[str, str] | None = None):
    """Start a job; returns the process, whose output goes to the file `out`."""
    return process(_run, job, [str(word) for word in argv], str(out), env or {}, fault)


def start_ranks(job: str, argv: list[str], out: Path, faults: tuple = (), world: int = 2) -> list:
    """Start `world` ranks as a launcher would; their output goes to out-0, out-1 and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            job, argv, out.with_name(f"{out.name}-{rank}"), faults, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world)
    ]


def ended(process, timeout: float = 120) -> int:
    """The exit code, once it has ended (negative: killed by that signal)."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode

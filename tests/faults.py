"""Helper of the tests that runs a job in a process of its own, with a fault if wanted.

A fault replaces a function of the project in that process, so that the project's code needs no hooks for faults. The
processes are forked from a server that has imported everything, so that a start takes a fraction of a second.
"""

import builtins
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import counted
import torch

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util import errors, misc
from util.checkpoint import files
from util.data import datasets
from util.data.images import BadImage
from util.report import log, monitor

MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "linprobe": main_linprobe.main}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(save: int) -> None:
    """Kill the process when checkpoint number `save` (from 1) is half written."""
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


def kill_after_rename(number: int) -> None:
    """Kill the process right after so many renames of checkpoints."""
    renames, rename = [0], os.replace

    def dying(source, target):
        rename(source, target)
        renames[0] += "checkpoint" in str(target)
        if renames[0] == number:
            _kill()

    os.replace = dying


def kill_after_log_line(number: int) -> None:
    """Kill the process right after so many lines of log.txt."""
    lines, epoch = [0], log.RunLog.write_epoch

    def dying(self, values):
        epoch(self, values)
        lines[0] += 1
        if lines[0] == number:
            _kill()

    log.RunLog.write_epoch = dying


def fill_disk(megabytes: float) -> None:
    """Let no file grow beyond so many megabytes, from the second checkpoint on."""
    write = misc.write_checkpoint
    saves = [0]

    def limited(state, paths):
        saves[0] += 1
        if saves[0] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        write(state, paths)

    misc.write_checkpoint = limited


def nan_loss(rank: int, first: int) -> None:
    """Make the loss NaN on one rank, after the first `first` forward passes of training."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def poisoned(self, *args, **kwargs):
        loss, pred, mask = forward(self, *args, **kwargs)
        calls[0] += not loss.is_meta  # there the operations are counted only
        bad = calls[0] > first and int(os.environ.get("RANK", 0)) == rank
        return loss * float("nan") if bad else loss, pred, mask

    models_mae.MaskedAutoencoderViT.forward = poisoned


def ignore_hangups() -> None:
    """Start as nohup starts programs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def slow_steps(seconds: float) -> None:
    """Slow every forward pass down by so many seconds, to leave time for a signal."""
    import time

    forward = models_mae.MaskedAutoencoderViT.forward

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return forward(self, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = slow


def fail(kind: str, first: int) -> None:
    """Raise an exception of this name, a builtin one, after the first `first` forward passes of training."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def failing(self, imgs, *args, **kwargs):
        calls[0] += not imgs.is_meta
        if calls[0] > first:
            raise getattr(builtins, kind)("a fault of the test")
        return forward(self, imgs, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = failing


def lose_images(rank: int, first: int, stopped_at: int = 0) -> None:
    """Let no image be readable any more on one rank, after its first `first` images; without loader processes.

    The rank gets SIGTERM at its image `stopped_at`; 0: never.
    """
    calls, get = [0], datasets.Images.__getitem__

    def losing(self, index):
        calls[0] += 1
        if calls[0] == stopped_at and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if calls[0] > first and int(os.environ.get("RANK", 0)) == rank:
            raise BadImage(f"image {index}: a fault of the test")
        return get(self, index)

    datasets.Images.__getitem__ = losing


def few_open_files(number: int) -> None:
    """Let the process and those that it starts open so many files at most."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def spoil_archive(path: str, first: int) -> None:
    """Overwrite an archive with zeros after the first `first` forward passes of training."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def spoiling(self, imgs, *args, **kwargs):
        calls[0] += not imgs.is_meta
        if calls[0] == first:
            with Path(path).open("r+b") as file:
                file.write(bytes(Path(path).stat().st_size))
        return forward(self, imgs, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = spoiling


def fail_monitor(kind: str, first: int) -> None:
    """Raise an exception of this name, a builtin one, in monitoring number `first` (from 0)."""
    calls, call = [0], monitor.Monitor.__call__

    def failing(self, *args):
        calls[0] += 1
        if calls[0] > first:
            raise getattr(builtins, kind)("a fault of the test")
        return call(self, *args)

    monitor.Monitor.__call__ = failing


def hang(rank: int, first: int) -> None:
    """Make one rank wait for ever, after the first `first` forward passes of training."""
    calls, forward = [0], models_mae.MaskedAutoencoderViT.forward

    def waiting(self, imgs, *args, **kwargs):
        calls[0] += not imgs.is_meta
        if calls[0] > first and int(os.environ["RANK"]) == rank:
            signal.pause()
        return forward(self, imgs, *args, **kwargs)

    models_mae.MaskedAutoencoderViT.forward = waiting


def dump_ranks(folder: Path) -> None:
    """After each epoch of training, store the rank's parameters, means and next random number."""
    for script in (main_pretrain, main_finetune, main_linprobe):
        script.train_one_epoch = _dumping(script.train_one_epoch, folder)


def _dumping(train, folder):
    def train_and_dump(model, *args, **kwargs):
        stats = train(model, *args, **kwargs)
        rank = torch.distributed.get_rank()
        state = {"model": model.module.state_dict(), "stats": stats, "next": torch.rand(1)}
        torch.save(state, Path(folder) / f"rank{rank}.pt")
        return stats

    return train_and_dump


FAULTS = {
    f.__name__: f
    for f in (
        dump_ranks,
        fail,
        fail_monitor,
        few_open_files,
        fill_disk,
        hang,
        ignore_hangups,
        kill_after_log_line,
        kill_after_rename,
        kill_while_writing,
        lose_images,
        nan_loss,
        slow_steps,
        spoil_archive,
    )
}


def _run(job: str, argv: list[str], out: str, env: dict[str, str], fault: tuple) -> None:
    """Run a job in this process, which the fork server has started, with its output in a file."""
    with Path(out).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started by nohup
    if fault:
        FAULTS[fault[0]](*fault[1:])
    errors.run(lambda: MAINS[job](argv))


# In Python 3.11 the fork server ignores sys.path when it imports the modules to preload.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])
# Counting operations starts autograd's threads. These initialise CUDA on a machine with a GPU, and processes that are
# forked afterwards can't use it any more.
if not torch.cuda.device_count():
    counted.remember_small_models()


def process(target, *args):
    """Start a process that runs a function at the top level of a module; return it."""
    started = _context.Process(target=target, args=args)
    started.start()
    return started


def start(job: str, argv: list[str], out: Path, fault: tuple = (), env: dict[str, str] | None = None):
    """Start a job in a process of its own.

    Args:
        job: A key of MAINS.
        argv: Its command line.
        out: File for its output.
        fault: Name and arguments of one of FAULTS; (): none.
        env: Additional environment variables.

    Returns:
        The process.
    """
    return process(_run, job, [str(argument) for argument in argv], str(out), env or {}, fault)


def start_ranks(job: str, argv: list[str], out: Path, fault: tuple = (), world: int = 2) -> list:
    """Start a job on several ranks, as a launcher would.

    Args:
        job: A key of MAINS.
        argv: Its command line.
        out: Beginning of the names of the files for their output: out-0, out-1 and so on.
        fault: Name and arguments of one of FAULTS; (): none.
        world: Number of ranks.

    Returns:
        The processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(world):
        rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(job, argv, out.with_name(f"{out.name}-{rank}"), fault, rank_env))
    return processes


def exit_code(process, timeout: float = 120) -> int:
    """Wait for the end of a process and return its exit code (negative: killed by that signal)."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode


def run_ranks(job: str, argv: list[str], folder: Path, faults: tuple = (), world: int = 2) -> str:
    """Run a job on several ranks to its end, as a launcher would start them; return what all of them printed."""
    processes = start_ranks(job, argv, folder / "out", faults, world)
    codes = [exit_code(process) for process in processes]
    output = "".join((folder / f"out-{rank}").read_text() for rank in range(world))
    assert codes == [0] * world, output[-3000:]
    return output

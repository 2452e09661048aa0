"""Signals to stop, and the time to save: requests to a run on which all ranks agree."""

import os
import signal
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as td

from util.distributed import dist

# SIGHUP: the terminal was closed, or the connection to it was lost.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Launchers repeat a signal: torchrun passes on what its processes have received from the terminal already, SLURM sends
# SIGTERM twice when a job's time is up. Under a launcher a signal within ECHO_S seconds of the first is an echo.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK")  # environment variables that they set
ECHO_S = 5.0


class Requests:
    """Requests to stop (by signal) or to save (by the clock), as a context in which a first signal doesn't end the run.

    Within the context SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP are only recorded, and `poll` reports them. SIGHUP
    stays ignored if it is ignored already, as under nohup. A second signal, which is not a launcher's echo, ends the
    process at once. Outside the main thread, signals are not handled.
    """

    def __init__(self, save_minutes: float) -> None:
        """Start the clock, and create the group over which the ranks agree; all ranks must call.

        Args:
            save_minutes: Minutes between checkpoints, by rank 0's clock; 0: no requests to save.
        """
        self.save_seconds = save_minutes * 60
        self.signum, self.signalled, self.saved = 0, 0.0, time.monotonic()
        self.exchange: td.Work | None = None
        self.group = dist.cpu_group()

    def __enter__(self) -> "Requests":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            noted = [signum for signum in HANDLED if signum != signal.SIGHUP or not under_nohup]
            self.previous = {signum: signal.signal(signum, self._on_signal) for signum in noted}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self.signalled = signum, now
            if dist.rank() == 0:
                # Not print: a signal may arrive while print holds its lock. The console may be gone.
                with suppress(OSError):
                    os.write(2, b"saving and stopping after this step; a second signal stops at once, without saving\n")
            if not any(variable in os.environ for variable in LAUNCHERS):
                # For the second signal the system's own handling is the quickest.
                for noted in self.previous:
                    signal.signal(noted, signal.SIG_DFL)
        elif now - self.signalled > ECHO_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def poll(self, failed: bool = False) -> tuple[int, bool, bool]:
        """Return what the ranks ask for: the signal to stop for (0: none), whether to save now, whether one failed.

        All ranks must call it equally often, and get the same answer. With several ranks it is the result of the
        exchange that the previous call started, which ran in the background since, so that no step waits for it.

        Args:
            failed: Whether this rank can't go on.
        """
        due = bool(self.save_seconds) and time.monotonic() - self.saved >= self.save_seconds
        if self.group is None:
            return self.signum, due, failed

        # The answer to the call before.
        answer = [0, 0, 0]
        if self.exchange is not None:
            self.exchange.wait()
            answer = self.flags.tolist()

        # Start the exchange whose result the next call returns. If this call's answer is to save, the clock has not
        # been restarted yet: do not request the same save again.
        self.flags = torch.tensor([self.signum, int(due and not answer[1] and dist.rank() == 0), int(failed)])
        self.exchange = td.all_reduce(self.flags, td.ReduceOp.MAX, group=self.group, async_op=True)
        return answer[0], bool(answer[1]), bool(answer[2])

    def save_done(self) -> None:
        """Start the clock again, after a checkpoint was written."""
        self.saved = time.monotonic()


def shield_worker() -> None:
    """Keep a loader process alive when a signal goes to the whole process group, so that the run can save.

    It still ends when its parent sends SIGTERM. On macOS nothing is changed.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()

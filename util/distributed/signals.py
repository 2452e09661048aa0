"""Requests from outside: signals to stop, the clock's to save, agreed on by all ranks."""

import os
import signal
import threading
import time

import torch
import torch.distributed as td

from util.distributed import dist

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 1.0


class Requests:
    """Within `with`, SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are noted rather than fatal; a second one ends the process
    at once.

    torchrun passes on what the terminal has sent already, so under it the echo within a second does not count.
    """

    def __init__(self, save_minutes: float) -> None:
        """save_minutes: rank 0 asks for a checkpoint as often; 0: never."""
        self.save_seconds = save_minutes * 60
        self.signum, self.noted, self.saved = 0, 0.0, time.monotonic()
        self.exchange: td.Work | None = None
        self.group = dist.cpu_group()

    def __enter__(self) -> "Requests":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: object) -> None:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        now = time.monotonic()
        if not self.signum:
            self.signum, self.noted = signum, now
            if dist.rank() == 0:
                os.write(2, b"saving and stopping after this step; once more to stop at once, unsaved\n")
            if not under_torchrun:  # the system's own handling is the quickest
                for number in HANDLED:
                    signal.signal(number, signal.SIG_DFL)
        elif now - self.noted > ECHO_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def poll(self) -> tuple[int, bool]:
        """The signal to stop for (0: none) and whether to save now: the same answer on every rank.

        All ranks must call it equally often. With several it is the answer to the call before, whose exchange went on
        in the background meanwhile.
        """
        due = bool(self.save_seconds) and time.monotonic() - self.saved >= self.save_seconds
        if self.group is None:
            return self.signum, due
        agreed = [0, 0]
        if self.exchange is not None:
            self.exchange.wait()
            agreed = self.flags.tolist()
        self.flags = torch.tensor([self.signum, int(due and not agreed[1] and dist.rank() == 0)])
        self.exchange = td.all_reduce(self.flags, td.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed[0], bool(agreed[1])

    def save_done(self) -> None:
        """A checkpoint was written: the clock starts again."""
        self.saved = time.monotonic()


def shield_worker() -> None:
    """In a loader process: stay alive when a signal goes to the whole process group, so that the run can save; end
    when the parent itself asks for it."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()

"""Running means of what a step computes, and the lines printed while an epoch goes on."""

import math
import time
from collections.abc import Callable, Iterator, Sized

import torch
from torch import Tensor

from util import dist


class Meters:
    """Means over the window since the last report and over the whole epoch, over all ranks.

    Values stay on their device until a report reads them, so that a step need not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._window: dict[str, tuple[Tensor | float, int]] = {}
        self._totals: dict[str, tuple[float, float]] = {}

    def update(self, **values: Tensor | float) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = (total + value, count + 1)

    def window(self) -> dict[str, float]:
        """Means since the last call, over all ranks (which must all call); waits for the device."""
        names = list(self._window)
        flat = [float(x) for name in names for x in self._window[name]]
        flat = dist.sum_over_ranks(flat, self.device)
        means = {}
        for name, total, count in zip(names, flat[::2], flat[1::2], strict=True):
            means[name] = total / count
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + total, old_count + count)
        self._window = {}
        return means

    def averages(self) -> dict[str, float]:
        """Means over everything that was reported so far."""
        return {name: total / count for name, (total, count) in self._totals.items()}

    def watch(
        self, loader: Sized, header: str, print_freq: int, report: Callable[[int, dict], None] | None = None
    ) -> Iterator:
        """Yield the loader's batches; every print_freq of them and after the last, print a line and call
        report(step, means of the window)."""
        steps = len(loader)
        start = window_start = time.perf_counter()
        for step, batch in enumerate(loader):
            yield batch
            if step % print_freq and step != steps - 1:
                continue
            means = self.window()
            now = time.perf_counter()
            per_step = (now - window_start) / (1 if step == 0 else (step - 1) % print_freq + 1)
            window_start = now
            eta = (now - start) / (step + 1) * (steps - step - 1)
            words = "  ".join(f"{name}: {_short(value)}" for name, value in means.items())
            times = f"s/step: {per_step:.3f}  left: {_clock(eta)}"
            dist.say(f"{header} [{step + 1}/{steps}]  {words}  {times}{self._memory()}")
            if report:
                report(step, means)

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return ""
        return f"  memory: {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MiB"


def _short(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def check_finite(loss: float, epoch: int, step: int) -> None:
    """Raise FloatingPointError if a loss, averaged over all ranks (so that all raise together), is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} in epoch {epoch} near step {step}: lower --blr, add --clip_grad or use --amp off; "
            "go on from the newest checkpoint with --resume"
        )

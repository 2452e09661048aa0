"""Running means of what a step computes, and the lines printed while an epoch goes on."""

import math
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from util.data.loaders import DeviceLoader
from util.distributed import dist

# Called at every logging step with (step, steps, means of the window, losses that were not finite by rank, speed).
Report = Callable[[int, int, dict[str, float], list[int], dict[str, float]], None]


class Meters:
    """Means over the window since the last report and over the whole epoch, over all ranks.

    Values stay on their device until a report reads them, so that a step need not wait for the device. Tensors that
    are not finite are left out of the means; those named "loss" are counted, by rank.
    """

    def __init__(
        self,
        device: torch.device,
        totals: dict[str, list[float]] | None = None,
        *,
        first_step: int = 0,
        images_per_step: int = 0,
        flops_per_image: float = 0.0,
        epochs: int = 0,
        on_report: Report | None = None,
    ) -> None:
        """Start the meters of an epoch.

        Args:
            device: Where the values are.
            totals: Sums and counts, over all ranks, of the epoch's beginning, where it is resumed.
            first_step: Batches of the epoch that are done already.
            images_per_step: Images in a batch of all ranks; 0: unknown, no images per second are shown.
            flops_per_image: Operations of a training step for each image; 0: unknown, no TFLOP/s are shown.
            epochs: Epochs of the whole run, for the time left; 0: unknown.
            on_report: Called at every logging step.
        """
        self.device, self.first_step, self.images_per_step, self.epochs = device, first_step, images_per_step, epochs
        self.flops_per_image, self.on_report = flops_per_image, on_report
        self._window: dict[str, tuple[Tensor | float, Tensor | int]] = {}
        self.totals = {name: list(pair) for name, pair in (totals or {}).items()}
        self._not_finite = 0.0
        self.waited = self.elapsed = 0.0  # seconds of this process: waiting for the loader, in all
        self.steps_done = 0  # by this process

    def update(self, **values: Tensor | float) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            total, count = self._window.get(name, (0.0, 0))
            if isinstance(value, Tensor):
                value = value.detach().float()
                finite = torch.isfinite(value)
                if name == "loss":
                    self._not_finite = self._not_finite + ~finite
                self._window[name] = (total + torch.where(finite, value, 0.0), count + finite)
            else:
                self._window[name] = (total + value, count + 1)

    def close_window(self) -> tuple[dict[str, float], list[int]]:
        """Close the window: return its means over all ranks, and how many losses were not finite on each rank.

        The window is added to `totals`. A mean is NaN where no value was finite. All ranks must call; waits for the
        device.
        """
        # One exchange for everything: the sums and counts, and a slot per rank for the losses that were not finite.
        names = list(self._window)
        flat = [float(x) for name in names for x in self._window[name]]
        by_rank = [0.0] * dist.world_size()
        by_rank[dist.rank()] = float(self._not_finite)
        flat = dist.sum_over_ranks(flat + by_rank, self.device)

        means = {}
        for index, name in enumerate(names):
            total, count = flat[2 * index : 2 * index + 2]
            means[name] = total / count if count else math.nan
            old_total, old_count = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = [old_total + total, old_count + count]
        self._window, self._not_finite = {}, 0.0
        return means, [int(count) for count in flat[2 * len(names) :]]

    def totals_so_far(self) -> dict[str, list[float]]:
        """Return [sum, count] of each figure over the epoch so far; all ranks must call.

        The window goes on: the next report covers it from its beginning.
        """
        before = self.snapshot()
        self.close_window()
        result = self.totals
        self.restore(before)
        return result

    def snapshot(self) -> tuple:
        """Return the sums of this moment, for `restore`, without waiting for the device."""
        totals = {name: list(pair) for name, pair in self.totals.items()}
        return dict(self._window), totals, self._not_finite

    def restore(self, snapshot: tuple) -> None:
        """Go back to the sums of a snapshot."""
        self._window, self.totals, self._not_finite = snapshot

    def averages(self) -> dict[str, float]:
        """Return the means over everything that was reported so far; NaN where no value was finite."""
        return {name: total / count if count else math.nan for name, (total, count) in self.totals.items()}

    def epoch_speed(self) -> dict[str, float]:
        """Return data_wait, the share of its time that this process waited for data, and tflops, all ranks' TFLOP/s.

        Both are over the part of the epoch trained here. The time includes whatever goes on between the steps: saving,
        logging, compilation in the first epoch. Where the process resumed at the end of the epoch, and trained nothing
        of it, the result is empty.
        """
        if not self.steps_done:
            return {}
        seconds = max(self.elapsed, 1e-9)
        images = self.steps_done * self.images_per_step
        return {"data_wait": self.waited / seconds, "tflops": images * self.flops_per_image / seconds / 1e12}

    def log_every(self, loader: DeviceLoader, print_freq: int, epoch: int) -> Iterator[tuple[int, object]]:
        """Yield (step, batch) for every batch that is left, and report every print_freq batches and after the last.

        A report closes the window, shows its means and the speed, and calls on_report. All ranks must iterate alike.
        len(loader) is the whole epoch's number of batches; its iterator gives those from first_step on.
        """
        steps = len(loader)
        progress = _Progress(steps, self.first_step, epoch, self.epochs)
        window_start, window_steps, waited_before = time.perf_counter(), 0, 0.0
        for step, batch in enumerate(self._timed(loader), self.first_step):
            yield step, batch
            window_steps += 1
            if step % print_freq and step != steps - 1:
                continue

            means, not_finite = self.close_window()
            now = time.perf_counter()
            images_per_s = window_steps * self.images_per_step / (now - window_start)
            speed = {
                "images_per_s": images_per_s,
                "tflops": images_per_s * self.flops_per_image / 1e12,
                "data_wait": (self.waited - waited_before) / (now - window_start),
            }
            progress.show(step, self._words(means, speed))
            window_start, window_steps, waited_before = now, 0, self.waited
            if self.on_report:
                self.on_report(step, steps, means, not_finite, speed)
        progress.close()

    def _words(self, means: dict[str, float], speed: dict[str, float]) -> list[str]:
        words = [f"{name} {_short(value)}" for name, value in means.items()]
        if self.images_per_step:
            rate = speed["images_per_s"]
            words.append(f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s")
        if self.flops_per_image:
            words.append(f"{speed['tflops']:.3g} TFLOP/s")
        words.append(f"data {speed['data_wait']:.0%}")
        if self.device.type == "cuda":
            words.append(f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f}G")
        return words

    def _timed(self, loader: DeviceLoader) -> Iterator[object]:
        """Yield the loader's batches; record the seconds waited for them, those of the whole loop, and the steps."""
        batches, begun = iter(loader), time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            yield batch
            self.elapsed = time.perf_counter() - begun
            self.steps_done += 1


class _Progress:
    """An epoch's progress on rank 0: on a terminal a line that changes, elsewhere one with a time stamp per report."""

    def __init__(self, steps: int, first_step: int, epoch: int, epochs: int) -> None:
        self.steps, self.first_step, self.epoch, self.epochs = steps, first_step, epoch, epochs
        self.header = f"{epoch}/{epochs}" if epochs else str(epoch)
        self.start, self.line = time.perf_counter(), None
        if dist.rank() == 0 and sys.stdout.isatty():
            # No bar is drawn: the terminal's columns are needed for the figures.
            self.line = tqdm(file=sys.stdout, dynamic_ncols=True, bar_format="{desc}", desc=self.header)

    def show(self, step: int, words: list[str]) -> None:
        """Show that batch `step` is done, with these figures and the time left."""
        per_step = (time.perf_counter() - self.start) / (step + 1 - self.first_step)
        left = _clock(per_step * (self.steps - step - 1))
        run_left = _clock(per_step * (self.steps * (self.epochs - self.epoch) - step - 1))
        if self.line is None:
            whole = f" (run: {run_left})" if self.epochs else ""
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            # demo.py and benchmarks/train.py read this line.
            where = f"epoch {self.header} [{step + 1}/{self.steps}]"
            dist.print_rank0(f"{stamp}  {where}  {'  '.join(words)}  left {left}{whole}")
            return
        # 80 columns are soon full.
        short = " ".join(words).replace(" img/s", "/s").replace(" TFLOP/s", "T")
        whole = f" {run_left}" if self.epochs else ""
        self.line.set_description_str(f"{self.header} {step + 1}/{self.steps} {short} {left}{whole}")

    def close(self) -> None:
        """End the line."""
        if self.line is not None:
            self.line.close()


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}:{minutes % 60:02d}:{seconds:02d}"

"""Running means of what a step computes, and the lines printed while an epoch goes on."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sized

import torch
from torch import Tensor
from tqdm import tqdm

from util.distributed import dist


class Meters:
    """Means over the window since the last report and over the whole epoch, over all ranks.

    Values stay on their device until a report reads them, so that a step need not wait for the device. What is not
    finite is left out of the means and counted, by rank.
    """

    def __init__(self, device: torch.device, totals: dict[str, list[float]] | None = None) -> None:
        """totals: the sums and counts, over all ranks, of an epoch's beginning."""
        self.device = device
        self._window: dict[str, tuple[Tensor | float, Tensor | int]] = {}
        self.totals = {name: list(pair) for name, pair in (totals or {}).items()}
        self._not_finite = 0.0
        self.waited = self.elapsed = 0.0  # seconds, for the loader and in all, of this process

    def update(self, **values: Tensor | float) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            total, count = self._window.get(name, (0.0, 0))
            if isinstance(value, Tensor):
                value = value.detach().float()
                finite = torch.isfinite(value)
                self._not_finite = self._not_finite + ~finite
                self._window[name] = (total + torch.where(finite, value, 0.0), count + finite)
            else:
                self._window[name] = (total + value, count + 1)

    def window(self) -> tuple[dict[str, float], list[int]]:
        """Means since the last call, over all ranks (which must all call), and how many values were not finite on
        each rank; waits for the device."""
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
        """The epoch's sums and counts, the window's included, which goes on. All ranks must call."""
        window, totals, not_finite = self._window, self.totals, self._not_finite
        self.totals = {name: list(pair) for name, pair in totals.items()}
        self.window()
        result = self.totals
        self._window, self.totals, self._not_finite = window, totals, not_finite
        return result

    def averages(self) -> dict[str, float]:
        """Means over everything that was reported so far."""
        return {name: total / count if count else math.nan for name, (total, count) in self.totals.items()}

    def watch(
        self,
        loader: Sized,
        first_step: int,
        epoch: int,
        print_freq: int,
        images_per_step: int,
        epochs: int,
        report: Callable[[int, dict[str, float], list[int], dict[str, float]], None],
    ) -> Iterator[tuple[int, object]]:
        """Yield (step, batch) from first_step on; every print_freq batches and after the last, call report(step, means
        of the window, values that were not finite by rank, speed) and print a line, or on a terminal move the bar on.

        images_per_step: over all ranks; epochs: of the whole run, for the time left.
        """
        steps, header = len(loader), f"{epoch}/{epochs}" if epochs else str(epoch)
        start = window_start = time.perf_counter()
        bar = None
        if dist.rank() == 0 and sys.stdout.isatty():
            bar = tqdm(
                total=steps,
                initial=first_step,
                desc=header,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{desc} {n_fmt}/{total_fmt} {bar:4}{postfix}",
            )
        in_window, waited_before = 0, 0.0
        for step, batch in enumerate(self._timed(loader), first_step):
            yield step, batch
            in_window += 1
            if step % print_freq and step != steps - 1:
                continue
            means, not_finite = self.window()
            now = time.perf_counter()
            per_step = (now - start) / (step + 1 - first_step)
            left, run_left = per_step * (steps - step - 1), per_step * (steps * (epochs - epoch) - step - 1)
            took = now - window_start
            words = [f"{name} {_short(value)}" for name, value in means.items()]
            speed = {
                "images_per_s": in_window * images_per_step / took,
                "data_wait": (self.waited - waited_before) / took,
            }
            words += [f"{speed['images_per_s']:.0f} img/s"] * (images_per_step > 0)
            words += [f"data {speed['data_wait']:.0%}"]
            if self.device.type == "cuda":
                words += [f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f}G"]
            clocks = _clock(left), _clock(run_left)
            window_start, in_window, waited_before = now, 0, self.waited
            if bar is not None:
                short = " ".join(words).replace(" img/s", "/s")  # 80 columns are soon full
                bar.set_postfix_str(" ".join([short, *clocks[: 1 + (epochs > 0)]]), refresh=False)
                bar.update(step + 1 - bar.n)
            else:
                whole = f" (run: {clocks[1]})" if epochs else ""
                dist.say(f"epoch {header} [{step + 1}/{steps}]  {'  '.join(words)}  left {clocks[0]}{whole}")
            report(step, means, not_finite, speed)
        if bar is not None:
            bar.close()

    def _timed(self, loader: Sized) -> Iterator[object]:
        """The batches; takes note of the seconds waited for them, and in all."""
        batches, begun = iter(loader), time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            yield batch
            self.elapsed = time.perf_counter() - begun


def _short(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}:{minutes % 60:02d}:{seconds:02d}"

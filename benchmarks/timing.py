"""Helpers of the benchmarks: flags, timing by turns, the device's peak rates and name, folders of linked images."""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from util.amp import LossScaler
from util.command_line import Parser

Step = Callable[[], object]  # one unit of work to be timed
ROOT = Path(__file__).resolve().parent.parent


class GpuFull(Exception):
    """Failure of a step for which the GPU has too little memory left."""


def create_parser(description: str, steps: int | None = None) -> Parser:
    """Create a parser of the flags that the benchmarks share: --device, --json and --steps.

    Args:
        description: The benchmark's docstring.
        steps: Default number of repetitions; None: without the flag --steps.
    """
    parser = Parser(description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    if steps is not None:
        parser.add_argument("--steps", default=steps, type=int, help="number of repetitions")
    return parser


def write_result(file: Path | None, result: dict) -> None:
    """Write the result to the file that --json names, if it names one."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")


def adamw(model: nn.Module, **implementation: bool) -> torch.optim.AdamW:
    """Build AdamW over a model's trained parameters, in one of torch's implementations, as fused=True."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **implementation)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler,
    forward: Callable[[], Tensor],
    wait: bool = False,
) -> Step:
    """Build a step of training: forward pass, backward pass and update.

    Args:
        model: The model.
        optimizer: Optimiser of its parameters.
        scaler: Mixed precision.
        forward: Runs the forward pass, and returns the loss.
        wait: Wait for the loss at the end of each step.
    """

    def step() -> None:
        with scaler.autocast():
            loss = forward()
        scaler.backward(loss)
        scaler.step(optimizer, model.parameters(), None)
        if wait:
            loss.item()

    return step


def matmul_step(dtype: torch.dtype, device: torch.device) -> tuple[Step, float]:
    """Build a step of square matrix products that keeps the device busy for a fifth of a second or more.

    So long a step measures the rate that the device sustains, not one that it reaches for a moment.

    Returns:
        The step, and its number of floating-point operations.
    """
    side = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    # As many products as fit into a fifth of a second at the best of four trials.
    fastest = min(seconds(partial(multiply, 1), device) for _ in range(4))
    count = max(1, math.ceil(0.2 / fastest))
    return partial(multiply, count), count * 2.0 * side**3


def copy_step(device: torch.device) -> tuple[Step, float]:
    """Build a step that copies a tensor ten times within the device's memory: 2 GiB on a GPU, 128 MiB on a CPU.

    Returns:
        The step, and the number of bytes that its ten copies read and write.
    """
    count = 2**31 if device.type == "cuda" else 2**27
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: [target.copy_(source) for _ in range(10)], 10 * 2.0 * count


def seconds(step: Step, device: torch.device) -> float:
    """Return the wall-clock seconds of one step, including the work that it leaves to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    timers: Mapping[str, Callable[[], float]], repetitions: int, warm_ups: int = 2
) -> dict[str, list[float]]:
    """Call timers by turns, so that slow changes of the machine (clock rates, other load) meet all alike.

    Args:
        timers: Functions by name, each of which runs a step and returns its seconds; every repetition calls each once.
            One that raises GpuFull is left out from then on, with a notice.
        repetitions: Number of measured repetitions.
        warm_ups: Repetitions before them that are not counted.

    Returns:
        The seconds of each step in each measured repetition, without those that were left out.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for repetition in range(-warm_ups, repetitions):
        for name in list(times):
            try:
                took = timers[name]()
            except GpuFull:
                print(f"notice: the row {name} is left out: the GPU has too little memory for it beside the others")
                del times[name]
                continue
            if repetition >= 0:
                times[name].append(took)
    return times


def interleave(steps: Mapping[str, Step], device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """Time steps of this process by turns; return the seconds of each in each repetition after two that warm up."""
    return take_turns({name: partial(seconds, step, device) for name, step in steps.items()}, repetitions)


def spread(values: list[float]) -> float:
    """Return (max - min) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def link_images(source: Path, target: Path, images: int) -> None:
    """Link every image of a folder into another, the whole set again and again until there are enough links.

    Args:
        source: Folder of images, a folder per class.
        target: Folder to fill, likewise a folder per class.
        images: Smallest number of links.
    """
    files = [(folder.name, file) for folder in sorted(source.iterdir()) for file in sorted(folder.iterdir())]
    rounds = -(-images // len(files))  # rounded up
    for number in range(rounds * len(files)):
        name, file = files[number % len(files)]
        (target / name).mkdir(parents=True, exist_ok=True)
        (target / name / f"{number // len(files)}_{file.name}").symlink_to(file.resolve())


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or that of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"

"""What the benchmarks share: timing by turns, the device's peak rates, its name, folders of linked images."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Step = Callable[[], object]
ROOT = Path(__file__).resolve().parent.parent


def matmul_step(dtype: torch.dtype, device: torch.device) -> tuple[Step, float]:
    """Matrix products that fill the device for about as long as a training step, and their floating-point operations:
    what it sustains, not what it does for a moment."""
    side = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    count = (5 if dtype == torch.float32 else 100) if device.type == "cuda" else 8

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return products, count * 2.0 * side**3


def copy_step(device: torch.device) -> tuple[Step, float]:
    """Return copies of a tensor that is larger than any cache, and the bytes that they read and write."""
    count = 2**31 if device.type == "cuda" else 2**27
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: [target.copy_(source) for _ in range(10)], 10 * 2.0 * count


def seconds(step: Step, device: torch.device) -> float:
    """Wall-clock time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleave(steps: Mapping[str, Step], device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each step in each repetition, after two that warm up; every repetition runs each step once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(-2, repetitions):
        for name, step in steps.items():
            took = seconds(step, device)
            if repetition >= 0:
                times[name].append(took)
    return times


def link_images(source: Path, target: Path, images: int) -> None:
    """Fill target with links to source's images, a folder per class, again and again until there are so many."""
    files = [(folder.name, file) for folder in sorted(source.iterdir()) for file in sorted(folder.iterdir())]
    for number in range(-(-images // len(files)) * len(files)):
        name, file = files[number % len(files)]
        (target / name).mkdir(parents=True, exist_ok=True)
        (target / name / f"{number // len(files)}_{file.name}").symlink_to(file.resolve())


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"

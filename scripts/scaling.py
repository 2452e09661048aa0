"""What pre-training costs on more GPUs: time per update, bytes exchanged, data rate, memory, checkpoints.

    python scripts/scaling.py --images_per_s 2150 1015 434 > tables.md
    python scripts/scaling.py --step base.json large.json huge.json      (files of benchmarks/step.py --json)

The figures of one device are for ViT-B, ViT-L and ViT-H; the rest is arithmetic on the flags below, whose defaults are
the assumptions of docs/SCALING.md. Sizes come from the models themselves.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae

MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
PER_NODE = 8


@dataclass
class Machine:
    """Speeds in bytes per second: of a GPU's exchange within its node, of a node's network; latency in seconds."""

    within: float
    between: float
    latency: float

    def exchange(self, size: float, gpus: int) -> float:
        """Seconds that an all-reduce of `size` bytes takes: 2 (n-1)/n of them cross the slowest link, in buckets of
        25 MB, each with a round of messages up and down a tree of the nodes."""
        nodes = math.ceil(gpus / PER_NODE)
        speed = self.within if nodes == 1 else min(self.within, self.between)
        rounds = 2 * math.ceil(math.log2(gpus)) if gpus > 1 else 0
        return 2 * (gpus - 1) / gpus * size / speed + math.ceil(size / 25e6) * rounds * self.latency


@dataclass
class Cost:
    """One update of the effective batch on so many GPUs."""

    compute: float
    exchange: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def update(parameters: int, rate: float, gpus: int, batch: int, micro: int, machine: Machine) -> Cost:
    """rate: images/s of one GPU, taken as that of any batch; micro: largest batch that a GPU takes at once. Gradients
    are exchanged once, during the last micro-batch's backward pass, two thirds of its time."""
    share = batch / gpus
    compute = share / rate
    overlap = min(share, micro) / rate * 2 / 3
    exchange = machine.exchange(4 * parameters, gpus)
    return Cost(compute, exchange, max(0.0, exchange - overlap))


def size_of(name: str) -> tuple[int, int]:
    """Parameters that are trained, and values in the model's part of a checkpoint."""
    with torch.device("meta"):
        model = models_mae.MODELS[name]()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(value.numel() for value in model.state_dict().values())


def table(head: list, rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cost of pre-training on many GPUs, as tables")
    add = parser.add_argument
    add("--images_per_s", nargs=3, type=float, metavar=("B", "L", "H"), help="of one GPU")
    add("--step", nargs=3, metavar="JSON", help="or take them from benchmarks/step.py's files, row ours")
    add("--batch", default=4096, type=int, help="effective batch")
    add("--micro", default=64, type=int, help="images that a GPU takes at once")
    add("--within", default=350.0, type=float, help="GB/s of an exchange within a node")
    add("--networks", nargs="+", default=[25.0, 100.0, 400.0, 3200.0], type=float, help="Gbit/s of a node's network")
    add("--latency", default=20.0, type=float, help="microseconds of a message between nodes")
    add("--image_kb", default=110.0, type=float, help="size of an image file")
    add("--per_core", default=453.0, type=float, help="images/s that a core decodes (BENCHMARKS.md)")
    args = parser.parse_args()
    if (args.images_per_s is None) == (args.step is None):
        parser.error("give --images_per_s, or --step")
    return args


def main() -> None:
    """Print the tables."""
    args = get_args()
    rates = args.images_per_s or [
        next(row["images_per_s"] for row in json.loads(Path(file).read_text())["rows"] if row["name"] == "ours")
        for file in args.step
    ]
    sizes = [size_of(name) for name in MODELS]
    names = ["ViT-B", "ViT-L", "ViT-H"]
    gpu_counts = (1, 8, 64, 512)
    machines = {gbit: Machine(args.within * 1e9, gbit / 8 * 1e9, args.latency * 1e-6) for gbit in args.networks}

    print("Memory and files\n")
    print(table(
        ["", "parameters, million", "gradients per update, GB", "parameters, gradients, AdamW, GB per GPU",
         "with --shard on 8 GPUs", "on 64", "checkpoint, GB"],
        [[name, f"{n / 1e6:.0f}", f"{4 * n / 1e9:.2f}", f"{16 * n / 1e9:.1f}", f"{(8 + 8 / 8) * n / 1e9:.1f}",
          f"{(8 + 8 / 64) * n / 1e9:.1f}", f"{(4 * stored + 8 * n) / 1e9:.1f}"]
         for name, (n, stored) in zip(names, sizes, strict=True)],
    ))  # fmt: skip
    print(f"Seconds per update of {args.batch} images, and efficiency, by the nodes' network\n")
    rows = []
    for name, (n, _), rate in zip(names, sizes, rates, strict=True):
        for gbit, machine in machines.items():
            costs = [update(n, rate, gpus, args.batch, args.micro, machine) for gpus in gpu_counts]
            rows.append([name, f"{gbit:g}", *(f"{cost.seconds:.3g} ({cost.efficiency:.0%})" for cost in costs)])
    print(table(["", "Gbit/s", *(f"{gpus} GPUs" for gpus in gpu_counts)], rows))
    print("What a node of 8 GPUs has to be fed, at full speed\n")
    print(table(
        ["", "images/s", "MB/s from files", "cores that decode", "all of 64 GPUs, GB/s", "of 512"],
        [[name, f"{PER_NODE * rate:.0f}", f"{PER_NODE * rate * args.image_kb / 1e3:.0f}",
          f"{PER_NODE * rate / args.per_core:.1f}", f"{64 * rate * args.image_kb / 1e6:.1f}",
          f"{512 * rate * args.image_kb / 1e6:.1f}"] for name, rate in zip(names, rates, strict=True)],
    ))  # fmt: skip


if __name__ == "__main__":
    main()

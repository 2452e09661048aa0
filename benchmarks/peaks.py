"""Measure what the device sustains: matrix products in bf16 and fp32, and copies within its memory.

    python benchmarks/peaks.py --json peaks.json

TFLOP/s of products of 8192 x 8192 matrices of random numbers (3072 x 3072 on a CPU), and TB/s of copies, counting what
is read and what is written; medians of --steps repetitions by turns, each of which takes a tenth of a second or more.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import copy_step, device_name, interleave, matmul_step


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", default=7, type=int, help="repetitions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    steps = {
        "bf16": matmul_step(torch.bfloat16, device),
        "fp32": matmul_step(torch.float32, device),
        "copy": copy_step(device),
    }
    times = interleave({name: step for name, (step, _) in steps.items()}, device, args.steps)
    rows = []
    for name, (_, work) in steps.items():
        median = statistics.median(times[name])
        spread = (max(times[name]) - min(times[name])) / median
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        rows.append({"name": name, "rate": work / median / 1e12, "unit": unit, "spread": spread})
        print(f"{name}: {rows[-1]['rate']:.4g} {unit}, spread {spread:.1%}")
    if args.json:
        result = {"rows": rows, "n": args.steps, "device": device_name(device), "torch": torch.__version__}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

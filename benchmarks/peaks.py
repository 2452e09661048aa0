"""Measure the rates that the device sustains: matrix products in bf16 and fp32, and copies within its memory.

    python benchmarks/peaks.py --json peaks.json

The figures are TFLOP/s of products of 8192 x 8192 matrices of random numbers (3072 x 3072 on a CPU), and TB/s of
copies, which count the bytes read and the bytes written. Each is the median of --steps repetitions by turns; a
repetition is a fifth of a second of products, or ten copies.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import copy_step, create_parser, device_name, interleave, matmul_step, spread, write_result
from util import errors


def main() -> None:
    """Measure the rates, print them, and write the JSON file."""
    parser = create_parser(__doc__, steps=7)
    args = parser.parse_args()
    device = torch.device(args.device)

    steps = {
        "bf16": matmul_step(torch.bfloat16, device),
        "fp32": matmul_step(torch.float32, device),
        "copy": copy_step(device),
    }
    times = interleave({name: step for name, (step, _) in steps.items()}, device, args.steps)

    # Divide the work by the median time.
    rows = []
    for name, (_, work) in steps.items():
        median = statistics.median(times[name])
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        row = {"name": name, "rate": work / median / 1e12, "unit": unit, "spread": spread(times[name])}
        print(f"{name}: {row['rate']:.4g} {unit}, spread {row['spread']:.1%}")
        rows.append(row)

    result = {"rows": rows, "n": args.steps, "device": device_name(device), "torch": torch.__version__}
    write_result(args.json, result)


if __name__ == "__main__":
    errors.run(main)

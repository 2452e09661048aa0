"""Compare a whole training run on photographs with its step alone: the cost of reading and decoding images.

    python benchmarks/train.py --data_path FOLDER --model mae_vit_large_patch16 --batch_size 256 --json train.json
    python benchmarks/train.py --data_path FOLDER --job finetune --model vit_base_patch16 --batch_size 256

FOLDER/train/<class>/ holds photographs. Each is linked as often as it takes to have enough for --windows windows of 20
steps. The rows:
    step    the row `ours` of benchmarks/step.py, whose batches are on the device already; measured before the run
    run     main_pretrain.py or main_finetune.py with its defaults and --num_workers: the rates that it prints for each
            window of 20 steps, without the first two, in which blocks are compiled and the loader starts
`data_wait` is the share of a window's time that the run waited for images.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import ROOT, create_parser, device_name, link_images, spread, write_result
from util import errors

WINDOW = 20  # steps between the progress lines of a run
LINE = re.compile(r"\[\d+/\d+\].* (\S+) img/s .* data (\d+)%")


def step_rate(args: argparse.Namespace, folder: Path) -> float:
    """Measure the images per second of the training step alone.

    Args:
        args: Flags of this script.
        folder: Temporary folder for the result of benchmarks/step.py.
    """
    flags = ["--job", args.job, "--model", args.model, "--batch_size", str(args.batch_size), "--device", args.device]
    flags += ["--rows", "ours", "--steps", "5", "--json", str(folder / "step.json")]
    subprocess.run([sys.executable, "benchmarks/step.py", *flags], cwd=ROOT, check=True)
    return json.loads((folder / "step.json").read_text())["rows"][0]["images_per_s"]


def run_rates(args: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """Run one epoch of main_JOB.py on linked images, and read its speed from the lines that it prints.

    Args:
        args: Flags of this script.
        folder: Temporary folder for the linked images and the run's output.

    Returns:
        Images per second and data_wait of each window of 20 steps, without the first two and the last.
    """
    # Three windows more than are measured: the first two and the last, which may be short.
    link_images(args.data_path / "train", folder / "train", WINDOW * (3 + args.windows) * args.batch_size)
    classes = len(list((folder / "train").iterdir()))

    # The defaults of the script, with mixing and random erasing as the paper has them.
    flags = ["--data_path", folder, "--output_dir", folder / "run", "--model", args.model, "--device", args.device]
    flags += ["--batch_size", args.batch_size, "--num_workers", args.num_workers, "--epochs", 1, "--warmup_epochs", 0]
    if args.job == "pretrain":
        flags += ["--norm_pix_loss", "--monitor_freq", 0]
    else:
        link_images(args.data_path / "train", folder / "val", 1)  # every image once
        flags += ["--nb_classes", classes, "--reprob", 0.25, "--mixup", 0.8, "--cutmix", 1.0]

    # Show the run's output, and read the rates in it.
    command = [sys.executable, f"main_{args.job}.py", *map(str, flags)]
    windows = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            windows += [(float(rate), float(wait) / 100) for rate, wait in LINE.findall(line)]
    if process.returncode:
        raise SystemExit(f"error: {command[1]} ended with exit code {process.returncode}; its messages are above")
    return windows[3:-1]  # the first line comes after a single step, the last after a shorter window


def get_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = create_parser(__doc__)
    parser.add_argument("--data_path", type=Path, required=True, help="folder that holds train/<class>/*.jpg")
    parser.add_argument("--job", default="pretrain", choices=("pretrain", "finetune"))
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", default=256, type=int)
    parser.add_argument("--num_workers", default=16, type=int)
    parser.add_argument("--windows", default=8, type=int, help="number of measured windows of 20 steps")
    args = parser.parse_args()
    if not (args.data_path / "train").is_dir():
        parser.error(f"--data_path {args.data_path}: it must hold train/<class>/ with photographs")
    return args


def main() -> None:
    """Measure the step and the run, print the comparison, and write the JSON file."""
    args = get_args()
    with tempfile.TemporaryDirectory() as temporary:
        step = step_rate(args, Path(temporary))
        windows = run_rates(args, Path(temporary))
    rates = [rate for rate, _ in windows]
    run = statistics.median(rates)

    result = {
        "job": args.job,
        "model": args.model,
        "batch_size": args.batch_size,
        "n": len(windows),
        "num_workers": args.num_workers,
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        "rows": [
            {"name": "step", "images_per_s": step},
            {
                "name": "run",
                "images_per_s": run,
                "of_step": run / step,
                "spread": spread(rates),
                "data_wait": statistics.median(wait for _, wait in windows),
                "all": rates,
            },
        ],
    }
    print(f"step {step:.1f} images/s, run {run:.1f}: {run / step:.1%}, data_wait {result['rows'][1]['data_wait']:.0%}")
    write_result(args.json, result)


if __name__ == "__main__":
    errors.run(main)

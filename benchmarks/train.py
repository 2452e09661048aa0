"""Compare whole training runs on photographs with their step alone: what reading and decoding images costs.

    python benchmarks/train.py --data_path FOLDER --model mae_vit_large_patch16 --batch_size 256 --json train.json
    python benchmarks/train.py --data_path FOLDER --job finetune --model vit_base_patch16 --batch_size 256

FOLDER/train/<class>/ holds photographs, which are linked until there are enough for --windows windows of 20 steps. The
rows:
    step    benchmarks/step.py's row `ours`: batches that are on the device already; measured just before the run
    run     main_pretrain.py or main_finetune.py, with its defaults and --num_workers: the rates that it prints for each
            window of 20 steps, without the first two, in which blocks are compiled and the loader starts
`data_wait` is the share of a window that the run waited for images.
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
from benchmarks.timing import ROOT, device_name, link_images

WINDOW = 20  # steps between the lines that a run prints
LINE = re.compile(r"\[\d+/\d+\].* (\d+) img/s  data (\d+)%")


def step_rate(args: argparse.Namespace, folder: Path) -> float:
    """Return the images per second of the step alone."""
    words = ["--job", args.job, "--model", args.model, "--batch_size", str(args.batch_size), "--device", args.device]
    words += ["--rows", "ours", "--steps", "5", "--json", str(folder / "step.json")]
    subprocess.run([sys.executable, "benchmarks/step.py", *words], cwd=ROOT, check=True)
    return json.loads((folder / "step.json").read_text())["rows"][0]["images_per_s"]


def run_rates(args: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """Return images per second and data_wait of each window of a whole run."""
    link_images(args.data_path / "train", folder / "train", WINDOW * (3 + args.windows) * args.batch_size)
    classes = len(list((folder / "train").iterdir()))
    words = ["--data_path", folder, "--output_dir", folder / "run", "--model", args.model, "--device", args.device]
    words += ["--batch_size", args.batch_size, "--num_workers", args.num_workers, "--epochs", 1, "--warmup_epochs", 0]
    if args.job == "pretrain":
        words += ["--norm_pix_loss", "--monitor_freq", 0]
    else:
        link_images(args.data_path / "train", folder / "val", 1)  # each once
        words += ["--nb_classes", classes, "--reprob", 0.25, "--mixup", 0.8, "--cutmix", 1.0]
    command = [sys.executable, f"main_{args.job}.py", *map(str, words)]
    windows = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            windows += [(float(rate), float(wait) / 100) for rate, wait in LINE.findall(line)]
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return windows[3:-1]  # the first line stands after one step, the last after a shorter window


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="holds train/<class>/ with photographs")
    parser.add_argument("--job", default="pretrain", choices=("pretrain", "finetune"))
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", default=256, type=int)
    parser.add_argument("--num_workers", default=16, type=int)
    parser.add_argument("--windows", default=8, type=int, help="of 20 steps, measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
                "spread": (max(rates) - min(rates)) / run,
                "data_wait": statistics.median(wait for _, wait in windows),
                "all": rates,
            },
        ],
    }
    print(f"step {step:.1f} images/s, run {run:.1f}: {run / step:.1%}, data_wait {result['rows'][1]['data_wait']:.0%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a linear probe costs beside its trunk's forward pass, and what a sweep of learning rates costs beside one.

    python benchmarks/probe.py --model vit_base_patch16 --batch_size 64 --json probe.json

The rows: `forward`, the trunk under inference_mode; `one` and `four`, a training step (forward, LARS update) of a probe
with one learning rate and with four. Same batch, which is on the device already; every repetition runs each row once.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_vit
from benchmarks.timing import Step, device_name, interleave
from engine_finetune import head_losses
from util import optim, speed
from util.amp import LossScaler


def build(row: str, name: str, imgs: torch.Tensor, targets: torch.Tensor) -> Step:
    """The step of a row."""
    device, scaler = imgs.device, LossScaler("auto", imgs.device)
    rates = [0.1, 0.2, 0.4, 0.8] if row == "four" else [0.1]
    model = models_vit.make_linear_probe(models_vit.MODELS[name](global_pool=False), len(rates)).to(device).train()
    speed.prepare(model, device, scaler.amp, "auto", None, False)
    optimizer = optim.probe_optimizer(model, rates, 0.0)

    def forward() -> None:
        with torch.inference_mode(), scaler.autocast():
            model.forward_features(imgs)

    def step() -> None:
        with scaler.autocast():
            losses = head_losses(model(imgs), targets)
        scaler.backward(losses.sum())
        scaler.step(optimizer, model.parameters(), None)

    return forward if row == "forward" else step


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16", choices=list(models_vit.MODELS))
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", default=7, type=int, help="repetitions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    imgs = torch.randn(args.batch_size, 3, 224, 224, device=device)
    targets = torch.randint(1000, (args.batch_size,), device=device)
    times = interleave(
        {row: build(row, args.model, imgs, targets) for row in ("forward", "one", "four")}, device, args.steps
    )
    median = {row: statistics.median(values) for row, values in times.items()}
    result = {
        "model": args.model, "batch_size": args.batch_size, "n": args.steps, "device": device_name(device),
        "torch": torch.__version__, "images_per_s": {row: args.batch_size / value for row, value in median.items()},
        "one_to_forward": median["forward"] / median["one"], "cost_of_four": median["four"] / median["one"],
        "spread": {row: (max(values) - min(values)) / median[row] for row, values in times.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

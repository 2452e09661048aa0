"""The three jobs on the samples, in minutes on two CPU cores, and one table of what came out.

    python demo.py [--output_dir output/demo] [--seed 0]

Pre-trains a small MAE on 2,000 pictures of clothes (samples/fashion_mnist, 28 x 28), probes and fine-tunes it, and
does the same without pre-training, for comparison. Each step is a command of the scripts and is printed; its output
goes to output_dir/<step>/out.txt.

output_dir/
    pretrain/ probe/ probe_untrained/ finetune/ scratch/     one output_dir per job
    results.json                                             the table's figures
    reconstruction.png                                       what the pre-trained model makes of val images
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

ROOT = Path(__file__).resolve().parent
DATA = "samples/fashion_mnist"

# The pictures are small and centred: crops are mild (--crop_scale) and evaluation uses the whole picture (--crop_pct).
COMMON = f"--data_path {DATA} --input_size 28 --num_workers 1 --amp off --overwrite"
CLASSIFY = f"{COMMON} --nb_classes 10 --crop_scale 0.95 1.0 --crop_pct 1 --save_freq 100 --eval_freq 100"
PRETRAIN = (
    f"main_pretrain.py {COMMON} --crop_scale 0.8 1.0 --model mae_vit_demo_patch4 --batch_size 64 --epochs 40 "
    "--warmup_epochs 4 --lr 2e-3 --monitor_freq 20"
)
PROBE = (
    f"main_linprobe.py {CLASSIFY} --model vit_demo_patch4 --cls_token --batch_size 50 --epochs 8 --warmup_epochs 1 "
    "--lr 15"
)
FINETUNE = (
    f"main_finetune.py {CLASSIFY} --model vit_demo_patch4 --batch_size 32 --epochs 10 --warmup_epochs 2 --lr 2e-3 "
    "--drop_path 0 --smoothing 0 --aa none --reprob 0"
)


def run(step: str, command: str, output_dir: Path, seed: int) -> dict[str, float]:
    """Run one script; returns the last line of its log.txt. Ends the demo with the step's output if it fails."""
    folder = output_dir / step
    folder.mkdir(parents=True, exist_ok=True)
    words = [*shlex.split(command), "--seed", str(seed), "--output_dir", str(folder)]
    print(f"\n{step}: python {' '.join(words)}", flush=True)
    start = time.time()
    with (folder / "out.txt").open("w") as out:
        code = subprocess.run([sys.executable, *words], stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{step} failed with exit code {code}:\n{(folder / 'out.txt').read_text()[-3000:]}")
    print(f"{step}: {time.time() - start:.0f} s", flush=True)
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def pixel_neighbours() -> float:
    """Accuracy (percent) of naming each val image after the nearest train image in raw pixels."""

    def pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*ImageFolder(f"{DATA}/{split}", TF.to_tensor), strict=True)
        return torch.stack(images).flatten(1), torch.tensor(labels)  # [N, C*H*W], [N]

    (train, train_labels), (val, val_labels) = pixels("train"), pixels("val")
    nearest = torch.cdist(val, train).argmin(dim=1)
    return 100 * (train_labels[nearest] == val_labels).float().mean().item()


def main() -> None:
    """Run the five jobs one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output_dir != parser.get_default("output_dir"):
        args.output_dir = args.output_dir.resolve()
    os.chdir(ROOT)
    start, epochs = time.time(), PRETRAIN.split("--epochs ")[1].split()[0]
    checkpoint = str(args.output_dir / "pretrain" / f"checkpoint-{int(epochs) - 1}.pth")
    encoder = f"--finetune {shlex.quote(checkpoint)}"

    loss = run("pretrain", PRETRAIN, args.output_dir, args.seed)["train_loss"]
    picture = args.output_dir / "reconstruction.png"
    words = f"main_reconstruct.py --images {DATA}/val --num 6 --crop_pct 1 --device cpu --output".split()
    subprocess.run([sys.executable, *words, str(picture), "--resume", checkpoint], check=True)
    results = {
        step: run(step, command, args.output_dir, args.seed)["test_acc1"]
        for step, command in (
            ("probe", f"{PROBE} {encoder}"),
            ("probe_untrained", PROBE),
            ("finetune", f"{FINETUNE} {encoder}"),
            ("scratch", FINETUNE),
        )
    }
    results |= {"pixel_neighbours": pixel_neighbours(), "pretrain_loss": loss, "seconds": time.time() - start}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        ("pre-training loss, last epoch", f"{loss:.4f}"),
        ("linear probe, pre-trained encoder", f"{results['probe']:.1f} %"),
        ("linear probe, untrained encoder", f"{results['probe_untrained']:.1f} %"),
        ("fine-tuned from the pre-trained encoder", f"{results['finetune']:.1f} %"),
        ("the same training from scratch", f"{results['scratch']:.1f} %"),
        ("nearest neighbour in raw pixels", f"{results['pixel_neighbours']:.1f} %"),
    ]
    took = f"{results['seconds']:.0f} s, seed {args.seed}"
    print(f"\nMAE on 2,000 Fashion-MNIST images, accuracy on 2,000 others ({took})")
    print("-" * 60)
    for name, value in rows:
        print(f"{name:<46}{value:>14}")
    print("-" * 60)
    print(f"Logs, checkpoints and TensorBoard events: {args.output_dir}; look at {picture}")


if __name__ == "__main__":
    main()

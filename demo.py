"""Pre-train, probe and fine-tune on the sample images, in minutes on two CPU cores, and print one table of the results.

    python demo.py [--quick] [--output_dir output/demo] [--seed 0]

Pre-trains a small MAE on 2,000 images of clothes (samples/fashion_mnist, 28 x 28), then probes and fine-tunes its
encoder, and does the same without pre-training, for comparison. Each step is a command of one of the scripts and is
printed, with a bar that shows how far it is; its output goes to output_dir/<step>/out.txt. --quick trains for fewer
epochs, in about two minutes; the differences then are smaller.

output_dir/
    pretrain/reconstructions/epoch-0009.png                  the first pictures, after about a minute
    pretrain/ probe/ probe_untrained/ finetune/ scratch/     the --output_dir of each job
    results.json                                             the table's figures
    reconstruction.png                                       how the pre-trained model reconstructs images of val/
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF
from tqdm import tqdm

from util import errors
from util.command_line import Parser

ROOT = Path(__file__).resolve().parent
DATA = "samples/fashion_mnist"

# The images are small and centred: crops are mild (--crop_scale), and evaluation uses the whole image (--crop_pct 1).
COMMON = f"--data_path {DATA} --input_size 28 --num_workers 1 --amp off --overwrite"
CLASSIFY = f"{COMMON} --nb_classes 10 --crop_scale 0.95 1.0 --crop_pct 1 --save_freq 100 --eval_freq 100"
PRETRAIN = (
    f"main_pretrain.py {COMMON} --crop_scale 0.8 1.0 --model mae_vit_demo_patch4 --batch_size 64 --epochs 40 "
    "--warmup_epochs 4 --lr 2e-3 --monitor_freq 10"
)
PROBE = (
    f"main_linprobe.py {CLASSIFY} --model vit_demo_patch4 --cls_token --batch_size 50 --epochs 8 --warmup_epochs 1 "
    "--lr 15"
)
FINETUNE = (
    f"main_finetune.py {CLASSIFY} --model vit_demo_patch4 --batch_size 32 --epochs 10 --warmup_epochs 2 --lr 2e-3 "
    "--drop_path 0 --smoothing 0 --aa none --reprob 0"
)

# Flags that --quick adds to the commands: the last of two values counts.
QUICK_PRETRAIN = " --epochs 12 --warmup_epochs 2 --monitor_freq 4"
QUICK_TRAIN = " --epochs 3 --warmup_epochs 1"

# How the jobs report, in their output, where they are.
PROGRESS = re.compile(r"epoch (?P<epoch>\d+)/\d+ \[(?P<step>\d+)/(?P<steps>\d+)\]  loss (?P<loss>\S+)")
MONITORED = re.compile(r"monitor after epoch (\d+)")


def epochs_of(command: str) -> int:
    """Return the value of --epochs in a command, the last one if there are several."""
    return int(command.split("--epochs ")[-1].split()[0])


def run(step: str, command: str, output_dir: Path, seed: int) -> dict[str, float]:
    """Run one step of the demo under a progress bar; its output goes to output_dir/<step>/out.txt.

    Args:
        step: Name of the step and of its folder.
        command: Script and flags, without --seed and --output_dir.
        output_dir: Folder of the demo.
        seed: Seed of the step.

    Returns:
        The last line of the step's log.txt.

    Raises:
        SystemExit: The step failed; the message holds the end of its output.
    """
    folder = output_dir / step
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*shlex.split(command), "--seed", str(seed), "--output_dir", str(folder)]
    print(f"\n{step}: python {' '.join(arguments)}", flush=True)

    start, epochs = time.time(), epochs_of(command)
    layout = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}, {remaining} left{postfix}"
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process, (folder / "out.txt").open("w") as out, tqdm(desc=step, total=epochs, bar_format=layout) as bar:
        try:
            for line in process.stdout:
                out.write(line)
                show(bar, line, folder)
        except BaseException:
            process.terminate()  # else it would go on when the demo is stopped
            raise
    if process.returncode:
        message = (folder / "out.txt").read_text()[-3000:]
        raise SystemExit(f"{step} failed with exit code {process.returncode}:\n{message}")
    print(f"{step}: {time.time() - start:.0f} s", flush=True)
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def show(bar: tqdm, line: str, folder: Path) -> None:
    """Move the bar as a line of a job's output says, and name the first pictures as soon as they are there.

    Args:
        bar: The job's bar, which counts epochs.
        line: A line of the job's output.
        folder: The job's output_dir.
    """
    if found := PROGRESS.search(line):
        bar.set_postfix_str(f"epoch {found['epoch']}, loss {found['loss']}", refresh=False)
        bar.update(int(found["epoch"]) + int(found["step"]) / int(found["steps"]) - bar.n)
    elif found := MONITORED.match(line):
        pictures = sorted((folder / "reconstructions").glob("epoch-*.png"))
        if len(pictures) == 1:
            bar.write(f"first reconstructions, after {int(found[1]) + 1} epochs: {pictures[0]}")


def pixel_neighbours() -> float:
    """Return the accuracy (percent) of classifying each val image by its nearest train image in raw pixels."""

    def load_pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*ImageFolder(f"{DATA}/{split}", TF.to_tensor), strict=True)
        return torch.stack(images).flatten(1), torch.tensor(labels)  # [N, C*H*W], [N]

    train, train_labels = load_pixels("train")
    val, val_labels = load_pixels("val")
    nearest = torch.cdist(val, train).argmin(dim=1)
    return 100 * (train_labels[nearest] == val_labels).float().mean().item()


def print_table(results: dict[str, float], seed: int, quick: bool) -> None:
    """Print the figures of results.json as a table, and whether they are those of --quick."""
    rows = [
        ("pre-training loss, last epoch", f"{results['pretrain_loss']:.4f}"),
        ("linear probe, pre-trained encoder", f"{results['probe']:.1f} %"),
        ("linear probe, untrained encoder", f"{results['probe_untrained']:.1f} %"),
        ("fine-tuned from the pre-trained encoder", f"{results['finetune']:.1f} %"),
        ("the same training from scratch", f"{results['scratch']:.1f} %"),
        ("nearest neighbour in raw pixels", f"{results['pixel_neighbours']:.1f} %"),
    ]
    duration = f"{results['seconds']:.0f} s, seed {seed}{', --quick' if quick else ''}"
    print(f"\nMAE on 2,000 Fashion-MNIST images, accuracy on 2,000 others ({duration})")
    print("-" * 60)
    for name, value in rows:
        print(f"{name:<46}{value:>14}")
    print("-" * 60)


def refuse_other_runs(output_dir: Path) -> None:
    """Raise a UserError if the demo's jobs, which overwrite what was there, would replace runs that are not its own."""
    for step in ("pretrain", "probe", "probe_untrained", "finetune", "scratch"):
        folder = output_dir / step
        if any(folder.glob("checkpoint-*.pth")) and not (folder / "out.txt").exists():
            raise errors.UserError(f"{folder} holds a run that is not the demo's: choose another --output_dir")


def main() -> None:
    """Run the five jobs one after the other and print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("output/demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of every job")
    parser.add_argument("--quick", action="store_true", help="train for fewer epochs, in about two minutes")
    args = parser.parse_args()

    # The samples and the default output_dir lie in the repository; any other is meant from where the user stands.
    if args.output_dir != parser.get_default("output_dir"):
        args.output_dir = args.output_dir.resolve()
    os.chdir(ROOT)
    refuse_other_runs(args.output_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the job under way is ended, too
    start = time.time()
    pretrain = PRETRAIN + (QUICK_PRETRAIN if args.quick else "")
    probe, finetune = (command + (QUICK_TRAIN if args.quick else "") for command in (PROBE, FINETUNE))

    # Pre-train, and draw how the model reconstructs images that it was not trained on.
    loss = run("pretrain", pretrain, args.output_dir, args.seed)["train_loss"]
    checkpoint = str(args.output_dir / "pretrain" / f"checkpoint-{epochs_of(pretrain) - 1}.pth")
    drawing = args.output_dir / "reconstruction.png"
    reconstruct = f"main_reconstruct.py --images {DATA}/val --num 6 --crop_pct 1 --device cpu".split()
    reconstruct += ["--output", str(drawing), "--resume", checkpoint]
    if code := subprocess.run([sys.executable, *reconstruct]).returncode:
        raise SystemExit(f"main_reconstruct.py failed with exit code {code}: {shlex.join(reconstruct)}")

    # Probe and fine-tune the pre-trained encoder; then the same without it, to see what pre-training is worth.
    from_encoder = f"--finetune {shlex.quote(checkpoint)}"
    commands = {
        "probe": f"{probe} {from_encoder}",
        "probe_untrained": probe,
        "finetune": f"{finetune} {from_encoder}",
        "scratch": finetune,
    }
    results = {step: run(step, command, args.output_dir, args.seed)["test_acc1"] for step, command in commands.items()}

    results |= {"pixel_neighbours": pixel_neighbours(), "pretrain_loss": loss, "seconds": time.time() - start}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results, args.seed, args.quick)
    print(f"Logs, checkpoints and TensorBoard events: {args.output_dir}; look at {drawing}")


if __name__ == "__main__":
    errors.run(main)

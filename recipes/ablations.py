"""The paper's ablations as trends, at the samples' scale: 2,000 training images, 2,000 others, three seeds.

    python recipes/ablations.py                        everything, two at a time, a thread each: about 3 hours
    python recipes/ablations.py --only mask_ratio      or decoder_depth, targets, sampling, length, partial

Every variant is demo.py's recipe but for what it names; it is pre-trained, linearly probed and fine-tuned. What is done
already is passed over, a run that was cut off goes on. `python scripts/results.py` makes tables and plots of it.

results/ablations/<variant>/seed<S>/{pretrain,probe,finetune}.jsonl      the runs' log.txt
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo

ROOT = demo.ROOT
EPOCHS = int(demo.PRETRAIN.split("--epochs ")[1].split()[0])
# By ablation: the variants and the flags of pre-training that make them; "default" is in all of them.
ABLATIONS = {
    "mask_ratio": {f"ratio{ratio}": f"--mask_ratio {ratio}" for ratio in (0.25, 0.5, 0.625, 0.875)},
    "decoder_depth": {f"depth{depth}": f"--decoder_depth {depth}" for depth in (1, 4, 8)},
    "targets": {"normalised": "--norm_pix_loss"},
    "sampling": {
        "block50": "--mask_sampling block --mask_ratio 0.5",
        "block75": "--mask_sampling block",
        "grid75": "--mask_sampling grid",
    },
    "length": {
        f"epochs{epochs}": f"--epochs {epochs} --warmup_epochs {max(1, epochs // 10)}" for epochs in (10, 20, 80)
    },
    "partial": {},
}
TRAINABLE = ("0", "0.5", "1", "2", "4")  # of 6 blocks; all of them: default's fine-tuning


def run(step: str, command: str, output: Path, kept: Path) -> None:
    """One script, unless its log is kept already; its output goes to output/out.txt."""
    if kept.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    words = [*shlex.split(command), "--num_workers", "0", "--resume", "auto", "--output_dir", str(output)]
    with (output / "out.txt").open("a") as out:
        code = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode
    if code:
        raise SystemExit(f"{step} failed with exit code {code}: see {output / 'out.txt'}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "log.txt", kept)
    last = json.loads(kept.read_text().splitlines()[-1])
    print(
        f"{step}: " + "  ".join(f"{name} {last[name]:.4g}" for name in ("train_loss", "test_acc1") if name in last),
        flush=True,
    )


def chain(variant: str, flags: str, seed: int, output: Path, results: Path, partial: bool) -> None:
    """Pre-train a variant, probe and fine-tune its encoder; partial: also with only the last blocks trained."""
    folder, kept = output / variant / f"seed{seed}", results / variant / f"seed{seed}"
    epochs = int(flags.split("--epochs ")[1].split()[0]) if "--epochs" in flags else EPOCHS
    encoder = f"--finetune {shlex.quote(str(folder / 'pretrain' / f'checkpoint-{epochs - 1}.pth'))} --seed {seed}"
    steps = {
        "pretrain": f"{demo.PRETRAIN} {flags} --seed {seed}",
        "probe": f"{demo.PROBE} {encoder}",
        "finetune": f"{demo.FINETUNE} {encoder}",
    }
    if partial:
        steps |= {f"partial{blocks}": f"{steps['finetune']} --trainable_blocks {blocks}" for blocks in TRAINABLE}
    for step, command in steps.items():
        run(f"{variant} seed {seed} {step}", command, folder / step, kept / f"{step}.jsonl")


def main() -> None:
    """Run what is wanted and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "ablations")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "ablations")
    args = parser.parse_args()
    variants = {"default": ""} | {name: flags for ablation in args.only for name, flags in ABLATIONS[ablation].items()}
    chains = [(name, flags, seed) for seed in args.seeds for name, flags in variants.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [
            pool.submit(
                chain,
                name,
                flags,
                seed,
                args.output_dir.resolve(),
                args.results.resolve(),
                "partial" in args.only and name == "default",
            )
            for name, flags, seed in chains
        ]
        for task in tasks:
            task.result()


if __name__ == "__main__":
    main()

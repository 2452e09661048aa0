"""Run the paper's ablations at the scale of the samples: 2,000 training images, 2,000 others, three seeds.

    python recipes/ablations.py --results FOLDER       all, two runs at a time with one thread each: about 3 hours
    python recipes/ablations.py --only mask_ratio      or decoder_depth, targets, sampling, length, partial

Every variant changes one aspect of demo.py's recipe (block50 also the mask ratio, the lengths also the warm-up), and is
pre-trained, linearly probed and fine-tuned. At this scale only trends can be compared with the paper. Runs that were
interrupted are resumed; runs whose logs are stored, as those of results/ are, are not repeated.
Their figures are printed; `python scripts/results.py` makes tables and plots of the logs under results/.

results/ablations/<variant>/seed<S>/{pretrain,probe,finetune,partial*}.jsonl      the runs' log.txt
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo
from util import errors
from util.command_line import Parser
from util.errors import UserError

ROOT = demo.ROOT

# Per ablation: its variants, and the flags of pre-training that make them. "default", without flags, is in all of them.
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
# Values of --trainable_blocks in partial fine-tuning. With all 6 blocks it is the default variant's fine-tuning.
TRAINABLE = ("0", "0.5", "1", "2", "4")


def run(step: str, command: str, output: Path, log: Path, needed: bool = False) -> None:
    """Run one script unless its log has been stored already, and print the figures of its last epoch.

    A run that was interrupted is resumed.

    Args:
        step: Name of the run, for messages.
        command: Script and flags, without --output_dir.
        output: The run's --output_dir; what it prints goes to out.txt there.
        log: Where a complete run's log.txt is stored.
        needed: Run it in any case: what it writes to `output` is needed, and not there.

    Raises:
        SystemExit: The run failed.
    """
    stored = log.exists() and not needed
    if not stored:
        _train(step, command, output, log)
    last = json.loads(log.read_text().splitlines()[-1])
    figures = "  ".join(f"{name} {last[name]:.4g}" for name in ("train_loss", "test_acc1") if name in last)
    print(f"{step}: {figures}" + (f"  (not repeated: stored in {log})" if stored else ""), flush=True)


def _train(step: str, command: str, output: Path, log: Path) -> None:
    # One thread and no loader processes: several runs go on at a time.
    output.mkdir(parents=True, exist_ok=True)
    arguments = [*shlex.split(command), "--num_workers", "0", "--resume", "auto", "--output_dir", str(output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (output / "out.txt").open("a") as out:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        raise SystemExit(f"{step} failed with exit code {done.returncode}: see {output / 'out.txt'}")

    # Store the log; that it is there marks the run as complete.
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "log.txt", log)


def chain(variant: str, flags: str, seed: int, output: Path, results: Path, partial: bool) -> None:
    """Pre-train a variant, then probe and fine-tune its encoder.

    Args:
        variant: Name of the variant.
        flags: Flags of pre-training that make it.
        seed: Seed of every step.
        output: Folder of the runs' output_dirs.
        results: Folder of the logs that are stored.
        partial: Also fine-tune with only the last blocks trained.
    """
    folder, logs = output / variant / f"seed{seed}", results / variant / f"seed{seed}"
    epochs = demo.epochs_of(flags if "--epochs" in flags else demo.PRETRAIN)
    checkpoint = folder / "pretrain" / f"checkpoint-{epochs - 1}.pth"
    encoder = f"--finetune {shlex.quote(str(checkpoint))} --seed {seed}"
    steps = {
        "pretrain": f"{demo.PRETRAIN} {flags} --seed {seed}",
        "probe": f"{demo.PROBE} {encoder}",
        "finetune": f"{demo.FINETUNE} {encoder}",
    }
    if partial:
        steps |= {f"partial{blocks}": f"{steps['finetune']} --trainable_blocks {blocks}" for blocks in TRAINABLE}
    # A stored log of pre-training is of no use to later steps without its checkpoint.
    incomplete = not all((logs / f"{step}.jsonl").exists() for step in steps)
    for step, command in steps.items():
        needed = step == "pretrain" and incomplete and not checkpoint.exists()
        run(f"{variant} seed {seed} {step}", command, folder / step, logs / f"{step}.jsonl", needed)


def main() -> None:
    """Run the chosen ablations, as far as their logs are not there yet."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS), help="ablations to run")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of every variant")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--output_dir", type=Path, default=ROOT / "output" / "ablations", help="folder of the runs")
    add("--results", type=Path, default=ROOT / "results" / "ablations", help="folder of the logs that are stored")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    output, results = args.output_dir.resolve(), args.results.resolve()

    # All variants of a seed before the next seed, so that an early end leaves every variant with as many seeds.
    variants = {"default": ""} | {name: flags for ablation in args.only for name, flags in ABLATIONS[ablation].items()}
    pool = ThreadPoolExecutor(args.jobs)
    try:
        tasks = [
            pool.submit(chain, name, flags, seed, output, results, partial="partial" in args.only and name == "default")
            for seed in args.seeds
            for name, flags in variants.items()
        ]
        for task in as_completed(tasks):
            task.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, no other variant is begun


if __name__ == "__main__":
    errors.run(main)

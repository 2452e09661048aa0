"""Check and measure everything on one GPU, in stages, within a time limit.

    make bench-gpu ARGS="--output gpu_results --photos FOLDER"
    python benchmarks/gpu.py --output gpu_results --minutes 60 --stages peaks step_base

Each stage is a command of tests/ or benchmarks/; what it measured goes to OUTPUT/STAGE.json, with the commit and the
versions, what it printed to OUTPUT/STAGE.log. A stage whose JSON file is there already is skipped, so that a run that
was cut off goes on where it was. A stage that would not fit into what is left of --minutes is dropped, and named at
the end. scripts/benchmark_tables.py turns the files into the tables of BENCHMARKS.md.

--photos FOLDER (FOLDER/train/<class>/*.jpg) is read by the stages train_*; without it they use tests/photos.
--quick makes everything small: it shows on a CPU, in two or three minutes, that each stage runs.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import ROOT, device_name

PACKAGES = ("torch", "torchvision", "timm", "transformers", "simplejpeg")


@dataclass(frozen=True)
class Stage:
    """A command that writes a JSON file.

    Attributes:
        name: Of the stage and its files.
        words: The command after "python"; {photos} and {device} are filled in.
        quick: The same, small enough for a CPU; "": nothing to show there.
        minutes: What it takes on an H100, at most; it is dropped where less is left, and ended after twice as long.
    """

    name: str
    words: str
    quick: str
    minutes: float


def _step(job: str, model: str, batch_size: int, more: str = "") -> str:
    return f"benchmarks/step.py --job {job} --model {model} --batch_size {batch_size} {more}"


def _train(job: str, model: str, batch_size: int, more: str = "") -> str:
    return f"benchmarks/train.py --data_path {{photos}} --job {job} --model {model} --batch_size {batch_size} {more}"


PRETRAIN_ROWS = "--rows ours ours_eager off hf hf_best --hf_attention sdpa"
COMPILED_ROWS = "--rows ours hf_compiled --hf_attention sdpa"
FEW_ROWS = "--rows ours off hf_best --hf_attention sdpa"
QUICK_STEP = _step("pretrain", "mae_vit_demo_patch4", 2, "--steps 1 --rows ours off")
QUICK_TRAIN = _train("pretrain", "mae_vit_tiny_patch16", 2, "--windows 1 --num_workers 1")
STAGES = (  # in order of value
    Stage("tests", "-m pytest -m gpu", "-m pytest tests/test_golden.py -k sincos", 3),
    Stage("peaks", "benchmarks/peaks.py", "benchmarks/peaks.py --steps 1", 0.5),
    Stage("step_large", _step("pretrain", "mae_vit_large_patch16", 256, PRETRAIN_ROWS), QUICK_STEP, 2.5),
    Stage("step_base", _step("pretrain", "mae_vit_base_patch16", 256, PRETRAIN_ROWS), "", 1.5),
    Stage("train_large", _train("pretrain", "mae_vit_large_patch16", 256), QUICK_TRAIN, 1.3),
    Stage("train_base", _train("pretrain", "mae_vit_base_patch16", 256), "", 1),
    Stage("finetune_base", _step("finetune", "vit_base_patch16", 256, FEW_ROWS), "", 0.7),
    Stage("finetune_large", _step("finetune", "vit_large_patch16", 128, FEW_ROWS), "", 1.5),
    Stage("train_finetune", _train("finetune", "vit_base_patch16", 256), "", 1),
    Stage("probe_base", _step("linprobe", "vit_base_patch16", 512, FEW_ROWS), "", 0.5),
    Stage("probe_large", _step("linprobe", "vit_large_patch16", 512, FEW_ROWS), "", 1),
    Stage("compiled_base", _step("pretrain", "mae_vit_base_patch16", 256, COMPILED_ROWS), "", 2),
    Stage("compiled_large", _step("pretrain", "mae_vit_large_patch16", 256, COMPILED_ROWS), "", 3),
    Stage(
        "step_huge", _step("pretrain", "mae_vit_huge_patch14", 128, "--rows ours hf_best --hf_attention sdpa"), "", 2
    ),
    Stage("tuning", "benchmarks/tuning.py", "", 4),
    Stage("masking_large", "benchmarks/masking.py --models mae_vit_large_patch16 --batch_size 128", "", 1.5),
    Stage("masking_huge", "benchmarks/masking.py --models mae_vit_huge_patch14 --batch_size 64", "", 2),
)


def versions(device: torch.device) -> dict[str, str]:
    """Describe the code and the machine that a figure comes from."""
    found = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    words = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(words, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    described = git.stdout.strip() if git and not git.returncode else "unknown"
    commit = os.environ.get("GIT_COMMIT", described)  # a copy of the tree without its history knows only the variable
    found |= {"commit": commit, "device": device_name(device), "cores": str(len(os.sched_getaffinity(0)))}
    if device.type == "cuda":
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(words, capture_output=True, text=True).stdout.split() if shutil.which(words[0]) else []
        found |= {"cuda": str(torch.version.cuda), "driver": driver[0] if driver else "unknown"}
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def command(stage: Stage, args: argparse.Namespace, file: Path) -> list[str]:
    """Return the stage's command, which writes its result to the file."""
    words = (stage.quick if args.quick else stage.words).format(photos=args.photos).split()
    if words[:2] == ["-m", "pytest"]:
        xdist = ["-n", "4"] if _version("pytest-xdist") != "none" and not args.quick else []
        return [sys.executable, *words, *xdist, "-p", "no:cacheprovider", f"--junitxml={file}"]
    return [sys.executable, *words, "--device", args.device, "--json", str(file)]


def read_result(file: Path) -> dict | None:
    """Read what a stage wrote: JSON, or pytest's XML; None where it wrote nothing."""
    if not file.exists():
        return None
    text = file.read_text()
    if not text.startswith("<?xml"):
        return json.loads(text)
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def run(stage: Stage, args: argparse.Namespace, limit: float) -> str:
    """Run a stage for at most so many seconds; return what came of it in a few words."""
    file = args.output / f"{stage.name}.json"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, (args.output / f"{stage.name}.log").open("w") as log:
        partial = Path(temporary) / "result"
        words = command(stage, args, partial)
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            process.wait()
            return f"ended after {limit:.0f} s"
        result = read_result(partial)
    seconds = time.monotonic() - start
    if result is None:
        return f"failed with exit code {code}; see {stage.name}.log"
    stored = {
        "stage": stage.name,
        "command": " ".join(words[1:]),
        "seconds": round(seconds, 1),
        **versions(torch.device(args.device)),
        "result": result,
    }
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stored, indent=1) + "\n")
    unfinished.replace(file)
    return f"done in {seconds:.0f} s" + (f", {len(result['failed'])} tests failed" if result.get("failed") else "")


def main() -> None:
    """Run the stages and say what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", default=9, type=float, help="time limit of the whole")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="default: all, in order")
    parser.add_argument("--photos", type=Path, help="holds train/<class>/*.jpg")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that every stage runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as temporary:
        if args.photos is None:
            args.photos = Path(temporary)
            (args.photos / "train").mkdir()
            (args.photos / "train" / "photos").symlink_to(ROOT / "tests" / "photos")
        outcomes = {}
        for stage in STAGES:
            if (args.stages and stage.name not in args.stages) or (args.quick and not stage.quick):
                continue
            left = end - time.monotonic()
            if (args.output / f"{stage.name}.json").exists():
                outcomes[stage.name] = "was there already"
            elif left < (20 if args.quick else 60 * stage.minutes):
                outcomes[stage.name] = f"dropped: {max(0, left):.0f} s were left"
            else:
                outcomes[stage.name] = run(stage, args, min(left, 120 * stage.minutes))
            print(f"{stage.name:16} {outcomes[stage.name]}", flush=True)
    if problems := [name for name, outcome in outcomes.items() if outcome.startswith(("failed", "ended"))]:
        sys.exit(f"no result of {', '.join(problems)}")


if __name__ == "__main__":
    main()

"""Check and measure everything on one GPU, in stages, within a time limit.

    make bench-gpu ARGS="--output gpu_results --photos FOLDER"
    python benchmarks/gpu.py --output gpu_results --minutes 60 --stages peaks step_base

Each stage is a command of tests/ or benchmarks/. Its measurements go to OUTPUT/STAGE.json, with the commit and the
versions; its printed output goes to OUTPUT/STAGE.log. A stage whose JSON file exists is skipped, so that a run that was
cut off resumes at the stage it had reached. A stage for which too little of --minutes is left is dropped and listed as
such. scripts/benchmark_tables.py turns the JSON files into the tables of BENCHMARKS.md.

The stages train_* read --photos FOLDER (FOLDER/train/<class>/*.jpg); without the flag they use tests/photos.
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
from util import errors
from util.command_line import Parser

PACKAGES = ("torch", "torchvision", "timm", "transformers", "simplejpeg")


@dataclass(frozen=True)
class Stage:
    """Command that writes a JSON file, or with pytest an XML file.

    Attributes:
        name: Name of the stage and of its files.
        arguments: The command line after "python"; {photos} is filled in.
        quick: The same in a form small enough for a CPU; "": the stage is left out with --quick.
        minutes: Longest time that it takes on an H100. The stage is dropped where less is left (with --quick: under 20
            s), and stopped after twice as long, or at the end of --minutes.
    """

    name: str
    arguments: str
    quick: str
    minutes: float


def _step(job: str, model: str, batch_size: int, flags: str = "") -> str:
    return f"benchmarks/step.py --job {job} --model {model} --batch_size {batch_size} {flags}"


def _train(job: str, model: str, batch_size: int, flags: str = "") -> str:
    return f"benchmarks/train.py --data_path {{photos}} --job {job} --model {model} --batch_size {batch_size} {flags}"


PRETRAIN_ROWS = "--rows ours ours_eager off hf hf_best --hf_attention sdpa"
COMPILED_ROWS = "--rows ours hf_compiled --hf_attention sdpa"
FEW_ROWS = "--rows ours off hf_best --hf_attention sdpa"
HUGE_ROWS = "--rows ours hf_best --hf_attention sdpa"
QUICK_STEP = _step("pretrain", "mae_vit_tiny_patch16", 2, "--steps 1 --rows ours off hf hf_best")
QUICK_TRAIN = _train("pretrain", "mae_vit_tiny_patch16", 2, "--windows 1 --num_workers 1")
STAGES = (  # the most valuable first, since the last may be dropped
    Stage("tests", "-m pytest -m gpu", "-m pytest tests/test_golden.py -k sincos", 3),
    Stage("peaks", "benchmarks/peaks.py", "benchmarks/peaks.py --steps 1", 0.5),
    Stage("step_large", _step("pretrain", "mae_vit_large_patch16", 256, PRETRAIN_ROWS), QUICK_STEP, 2.5),
    Stage("step_base", _step("pretrain", "mae_vit_base_patch16", 256, PRETRAIN_ROWS), "", 1.5),
    Stage("train_large", _train("pretrain", "mae_vit_large_patch16", 256), QUICK_TRAIN, 2),
    Stage("train_base", _train("pretrain", "mae_vit_base_patch16", 256, "--num_workers 14"), "", 2),
    Stage("finetune_base", _step("finetune", "vit_base_patch16", 256, FEW_ROWS), "", 1.3),
    Stage("finetune_large", _step("finetune", "vit_large_patch16", 128, FEW_ROWS), "", 1.5),
    Stage("train_finetune", _train("finetune", "vit_base_patch16", 256), "", 2),
    Stage("probe_base", _step("linprobe", "vit_base_patch16", 512, FEW_ROWS), "", 1.2),
    Stage("probe_large", _step("linprobe", "vit_large_patch16", 512, FEW_ROWS), "", 2),
    Stage("compiled_base", _step("pretrain", "mae_vit_base_patch16", 256, COMPILED_ROWS), "", 2),
    Stage("compiled_large", _step("pretrain", "mae_vit_large_patch16", 256, COMPILED_ROWS), "", 3),
    Stage("step_huge", _step("pretrain", "mae_vit_huge_patch14", 128, HUGE_ROWS), "", 2),
    Stage("tuning", "benchmarks/tuning.py", "", 4),
    Stage("tuning_base", "benchmarks/tuning.py --model mae_vit_base_patch16 --rows blocks whole graphs", "", 2),
    Stage("masking_large", "benchmarks/masking.py --models mae_vit_large_patch16 --batch_size 128", "", 1.5),
    Stage("masking_huge", "benchmarks/masking.py --models mae_vit_huge_patch14 --batch_size 64", "", 2),
)


def versions(device: torch.device) -> dict[str, str]:
    """Describe the code and the machine that a measurement comes from.

    Returns:
        Versions of the packages ("none" if not installed), Python and, on a GPU only, CUDA and the driver; the commit
        ($GIT_COMMIT if set), the device's name, and the number of cores.
    """
    described = _output("git", "describe", "--always", "--dirty")
    info = {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        # In a copy of the tree without its history only the variable tells the commit.
        "commit": os.environ.get("GIT_COMMIT", described or "unknown"),
        "device": device_name(device),
        "cores": str(len(os.sched_getaffinity(0))),
    }
    if device.type == "cuda":
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
        info |= {"cuda": str(torch.version.cuda), "driver": drivers[0] if drivers else "unknown"}
    return info


def _output(*command: str) -> str:
    """Return the output of a command; "" if the program does not exist or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode else done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def command(stage: Stage, args: argparse.Namespace, file: Path) -> list[str]:
    """Return the arguments of Python that run a stage.

    Args:
        stage: The stage.
        args: Flags of this script.
        file: File that the command is to write its result to.
    """
    words = (stage.quick if args.quick else stage.arguments).split()
    arguments = [word.format(photos=args.photos) for word in words]
    if arguments[:2] == ["-m", "pytest"]:
        xdist = ["-n", "4"] if _version("pytest-xdist") != "none" and not args.quick else []
        return [*arguments, *xdist, "-p", "no:cacheprovider", f"--junitxml={file}"]
    return [*arguments, "--device", args.device, "--json", str(file)]


def without_local_paths(arguments: list[str], args: argparse.Namespace, file: Path) -> str:
    """Return the arguments of a stage as they are published: without the result's file, and with PHOTOS for the folder.

    Args:
        arguments: What `command` returned.
        args: Flags of this script.
        file: File that the command writes its result to.
    """
    words = [word for word in arguments if word != "--json" and str(file) not in word]
    return " ".join("PHOTOS" if word == str(args.photos) else word for word in words)


def read_result(file: Path) -> dict | None:
    """Read the result of a stage, JSON or pytest's XML.

    Returns:
        The contents of a JSON file; for pytest's XML, the numbers of passed and skipped tests and the names of the
        failed ones; None if there is no file.
    """
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
    """Run a stage and store its result in OUTPUT/STAGE.json.

    Args:
        stage: The stage.
        args: Flags of this script.
        limit: Seconds after which it is stopped.

    Returns:
        The outcome in a few words, which begin with "failed" or "ended" if there is no result, or tests failed.
    """
    file = args.output / f"{stage.name}.json"
    start = time.monotonic()

    # Run the command in a session of its own, so that it can be stopped with all processes that it has started.
    with tempfile.TemporaryDirectory() as temporary, (args.output / f"{stage.name}.log").open("w") as log:
        partial = Path(temporary) / "result"
        arguments = command(stage, args, partial)
        argv = [sys.executable, *arguments]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended: its time limit of {limit:.0f} s was over"
        result = read_result(partial)
    seconds = time.monotonic() - start
    if result is None:
        printed = (args.output / f"{stage.name}.log").read_text().splitlines()
        return f"failed with exit code {code}; the end of {stage.name}.log:\n" + "\n".join(printed[-10:])

    # Store the result under its final name only once it is complete: a file of that name says that the stage is done.
    stored = {
        "stage": stage.name,
        "command": without_local_paths(arguments, args, partial),
        "seconds": round(seconds, 1),
        **versions(torch.device(args.device)),
        "result": result,
    }
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stored, indent=1) + "\n")
    unfinished.replace(file)
    failed = f"failed: {len(result['failed'])} tests, " if result.get("failed") else ""
    return f"{failed}done in {seconds:.0f} s"


def get_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", default=9, type=float, help="time limit of all stages together")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="default: all, in order")
    parser.add_argument("--photos", type=Path, help="folder that holds train/<class>/*.jpg")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that every stage runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def run_or_skip(stage: Stage, args: argparse.Namespace, left: float) -> str:
    """Run a stage unless its result exists or too little time is left.

    Args:
        stage: The stage.
        args: Flags of this script.
        left: Seconds that are left of --minutes.

    Returns:
        The outcome in a few words.
    """
    if (args.output / f"{stage.name}.json").exists():
        return "skipped: has a result already"
    needed = 20 if args.quick else 60 * stage.minutes
    if left < needed:
        return f"dropped: {max(0, left):.0f} s left, up to {needed:.0f} s needed"
    return run(stage, args, min(left, 120 * stage.minutes))


def main() -> None:
    """Run the stages and print the outcome of each; exit with an error if one failed or ran out of time."""
    args = get_args()
    args.photos = args.photos.resolve() if args.photos else None  # the stages run in the repository's folder
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as temporary:
        # Without --photos the few photographs of the tests serve.
        if args.photos is None:
            args.photos = Path(temporary)
            (args.photos / "train").mkdir()
            (args.photos / "train" / "photos").symlink_to(ROOT / "tests" / "photos")

        # A stage that fails does not keep the next ones from running.
        outcomes = {}
        for stage in STAGES:
            if (args.stages and stage.name not in args.stages) or (args.quick and not stage.quick):
                continue
            outcomes[stage.name] = run_or_skip(stage, args, end - time.monotonic())
            print(f"{stage.name:16} {outcomes[stage.name]}", flush=True)
    if failed := [name for name, outcome in outcomes.items() if outcome.startswith(("failed", "ended"))]:
        sys.exit(f"error: no result, or failed tests, of {', '.join(failed)}; see their files in {args.output}")


if __name__ == "__main__":
    errors.run(main)

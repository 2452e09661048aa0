"""Turn the results of `make bench-gpu` into the tables of BENCHMARKS.md.

python scripts/benchmark_tables.py gpu_results                      to stdout
python scripts/benchmark_tables.py gpu_results --into BENCHMARKS.md between its lines "<!-- NAME -->" and
                                                                    "<!-- end of NAME -->", NAME the folder's
"""

import argparse
import json
import re
import sys
from pathlib import Path

STEPS = {"pretrain": "Pre-training", "finetune": "Fine-tuning", "linprobe": "Linear probing"}


def table(head: list, rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def machine(stage: dict) -> str:
    """Describe the machine and the versions that a stage ran on."""
    packages = ", ".join(f"{name} {stage[name]}" for name in ("torch", "torchvision", "timm", "transformers"))
    gpu = f", CUDA {stage['cuda']}, driver {stage['driver']}" if "driver" in stage else ""
    return f"{stage['device']}, {stage['cores']} cores{gpu}, Python {stage['python']}, {packages}"


def source(stage: dict) -> str:
    """Say what was run, how often, and at which commit."""
    n = f"n = {stage['result']['n']}, " if "n" in stage["result"] else ""
    return f"`python {stage['command']}`, {n}commit {stage['commit']}:\n"


def tests(result: dict) -> str:
    """Return the outcome of the tests."""
    failed = f": {', '.join(result['failed'])}" if result["failed"] else ""
    return f"{result['passed']} passed, {result['skipped']} skipped, {len(result['failed'])} failed{failed}.\n"


def peaks(result: dict) -> str:
    """Return the table of the device's rates."""
    rows = [[row["name"], f"{row['rate']:.4g} {row['unit']}", f"{row['spread']:.1%}"] for row in result["rows"]]
    return table(["", "sustained", "spread"], rows)


def steps(result: dict) -> str:
    """Return the table of a training step."""
    ours = result["rows"][0]["images_per_s"]
    rows = [
        [
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{ours / row['images_per_s']:.2f}",
            f"{row['tflops']:.0f}",
            f"{row['fraction_of_peak']:.0%}",
            f"{row['spread']:.1%}",
            f"{row['peak_memory_gb']:.1f}",
        ]
        for row in result["rows"]
    ]
    peak = result["peak_tflops"]["bf16"]
    title = f"{STEPS[result['job']]}, {result['model']}, batch {result['batch_size']}; bf16 peak {peak:.0f} TFLOP/s"
    head = [title, "images/s", "ours / it", "TFLOP/s", "of the peak", "spread", "peak memory, GB"]
    return table(head, rows)


def trainings(result: dict) -> str:
    """Return the table of a whole run beside its step."""
    step, run = result["rows"]
    title = f"{STEPS[result['job']]}, {result['model']}, batch {result['batch_size']}, {result['num_workers']} workers"
    rows = [
        ["step alone", f"{step['images_per_s']:.0f}", "100%", "", ""],
        [
            f"main_{result['job']}.py on photographs",
            f"{run['images_per_s']:.0f}",
            f"{run['of_step']:.1%}",
            f"{run['spread']:.1%}",
            f"{run['data_wait']:.0%}",
        ],
    ]
    return table([title, "images/s", "of the step", "spread", "data_wait"], rows)


def tuning(result: dict) -> str:
    """Return the tables of what was tried to go faster."""
    base = result["rows"][0]["images_per_s"]
    rows = [
        [
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{row['images_per_s'] / base:.3f}",
            f"{row['spread']:.1%}",
            f"{row['peak_memory_gb']:.1f}",
        ]
        for row in result["rows"]
    ]
    title = f"{result['model']}, batch {result['batch_size']}"
    text = table([title, "images/s", "of the first", "spread", "peak memory, GB"], rows)
    if result["attention"]:
        places = dict.fromkeys(row["place"] for row in result["attention"])
        kernels = dict.fromkeys(row["name"] for row in result["attention"])
        ms = {(row["place"], row["name"]): f"{row['ms']:.3f}" for row in result["attention"]}
        cells = [[place, *(ms.get((place, kernel), "") for kernel in kernels)] for place in places]
        text += "\n" + table(["attention, forward and backward, ms", *kernels], cells)
    return text


def masking(result: dict) -> str:
    """Return the paper's Table 2."""
    names = {"tokens": "mask tokens through the encoder", "8": "MAE, 8-block decoder", "1": "MAE, 1-block decoder"}
    rows = [
        [
            f"{row['model']}, {names[row['row']]}",
            f"{row['images_per_s']:.0f}",
            f"{row['spread']:.1%}",
            f"{row['ratio']:.2f}",
            f"{row['paper']:.1f}",
        ]
        for row in result["rows"]
    ]
    return table([f"batch {result['batch_size']}", "images/s", "spread", "times the baseline", "paper"], rows)


SECTIONS = (  # title, the stages' names begin with, the function that makes a table of a stage
    ("Tests on the device", "tests", tests),
    ("What the device sustains", "peaks", peaks),
    ("A training step", ("step_", "compiled_", "finetune_", "probe_"), steps),
    ("Whole runs on photographs", "train_", trainings),
    ("What was tried to go faster", "tuning", tuning),
    ("What masking saves: the paper's Table 2", "masking_", masking),
)


def render(folder: Path) -> str:
    """Return all tables of a folder of results, and say what has none."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    machines = dict.fromkeys(machine(stage) for stage in stages.values())
    text = "".join(f"\n{name}.\n" for name in machines)
    for title, begins, make in SECTIONS:
        found = [stage for name, stage in stages.items() if name.startswith(begins)]
        text += f"\n### {title}\n"
        for stage in found:
            place = f"{machine(stage)}. " if len(machines) > 1 else ""
            text += f"\n{place}{source(stage)}\n{make(stage['result'])}"
        text += "" if found else "\nNot measured.\n"
    return text


def main() -> None:
    """Print the tables, or put them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, help="the document to change, in place")
    args = parser.parse_args()
    if not list(args.folder.glob("*.json")):
        sys.exit(f"error: {args.folder} holds no results: make them with make bench-gpu")
    text = render(args.folder)
    if not args.into:
        print(text)
        return
    begin, end = f"<!-- {args.folder.name} -->", f"<!-- end of {args.folder.name} -->"
    document = args.into.read_text()
    if begin not in document or end not in document:
        sys.exit(f'error: {args.into} has no lines "{begin}" and "{end}" to put the tables between')
    args.into.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", document, flags=re.DOTALL))


if __name__ == "__main__":
    main()

"""Turn the results of `make bench-gpu` into the tables of BENCHMARKS.md.

    python scripts/benchmark_tables.py gpu_results
    python scripts/benchmark_tables.py gpu_results --into BENCHMARKS.md

The tables are printed, or with --into replace the part of a document between its lines "<!-- NAME -->" and
"<!-- end of NAME -->", where NAME is the name of the folder.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors
from util.command_line import Parser
from util.errors import UserError

STEPS = {"pretrain": "Pre-training", "finetune": "Fine-tuning", "linprobe": "Linear probing"}


def table(head: list, rows: list[list]) -> str:
    """Format a Markdown table of a head and rows of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def describe_machine(stage: dict) -> str:
    """Describe the machine and the versions that a stage ran on."""
    packages = ", ".join(f"{name} {stage[name]}" for name in ("torch", "torchvision", "timm", "transformers"))
    gpu = f", CUDA {stage['cuda']}, driver {stage['driver']}" if "driver" in stage else ""
    return f"{stage['device']}, {stage['cores']} cores{gpu}, Python {stage['python']}, {packages}"


def describe_run(stage: dict) -> str:
    """Describe a stage's run: the command, the number of measurements, and the commit; for a step also the peak."""
    result = stage["result"]
    repeats = f", n = {result['n']}" if "n" in result else ""
    peak = f", bf16 peak {result['peak_tflops']['bf16']:.0f} TFLOP/s" if "peak_tflops" in result else ""
    return f"`python {stage['command']}`{repeats}, commit {stage['commit']}{peak}"


def tests(result: dict) -> str:
    """Return the outcome of the tests as a sentence."""
    failed = f": {', '.join(result['failed'])}" if result["failed"] else ""
    return f"{result['passed']} passed, {result['skipped']} skipped, {len(result['failed'])} failed{failed}.\n"


def peaks(result: dict) -> str:
    """Return the table of the arithmetic and memory rates that the device sustains."""
    rows = [[row["name"], f"{row['rate']:.4g} {row['unit']}", f"{row['spread']:.1%}"] for row in result["rows"]]
    return table(["", "sustained", "spread"], rows)


def steps(results: list[dict]) -> str:
    """Return one table of training steps; the first row of each is this code, with which the others are compared."""
    rows = []
    for result in results:
        title = f"{STEPS[result['job']]}, {result['model']}, batch {result['batch_size']}"
        base_rate = result["rows"][0]["images_per_s"]
        rows += [
            [
                "" if number else title,
                row["name"],
                f"{row['images_per_s']:.0f}",
                f"{base_rate / row['images_per_s']:.2f}",
                f"{row['tflops']:.0f}",
                f"{row['fraction_of_peak']:.0%}",
                f"{row['spread']:.1%}",
                f"{row['peak_memory_gb']:.1f}",
            ]
            for number, row in enumerate(result["rows"])
        ]
    head = ["step", "row", "images/s", "ours / it", "TFLOP/s", "of the peak", "spread", "peak memory, GB"]
    return table(head, rows)


def trainings(results: list[dict]) -> str:
    """Return one table of whole training runs, each beside its step alone, which shows what loading costs."""
    rows = []
    for result in results:
        step, run = result["rows"]
        rows.append(
            [
                f"main_{result['job']}.py, {result['model']}, batch {result['batch_size']}",
                result["num_workers"],
                f"{step['images_per_s']:.0f}",
                f"{run['images_per_s']:.0f}",
                f"{run['of_step']:.1%}",
                f"{run['spread']:.1%}",
                f"{run['data_wait']:.0%}",
            ]
        )
    head = ["run", "workers", "step alone, images/s", "run, images/s", "of the step", "spread", "data_wait"]
    return table(head, rows)


def tuning(result: dict) -> str:
    """Return the tables of the settings that were tried for speed, and of the attention kernels."""
    base_rate = result["rows"][0]["images_per_s"]
    rows = [
        [
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{row['images_per_s'] / base_rate:.3f}",
            f"{row['spread']:.1%}",
            f"{row['peak_memory_gb']:.1f}",
        ]
        for row in result["rows"]
    ]
    title = f"{result['model']}, batch {result['batch_size']}"
    text = table([title, "images/s", "of the first", "spread", "peak memory, GB"], rows)

    # Attention by itself: a row per shape (encoder, decoder, ...), a column per kernel; not all run on every shape.
    if result["attention"]:
        places = dict.fromkeys(row["place"] for row in result["attention"])
        kernels = dict.fromkeys(row["name"] for row in result["attention"])
        ms = {(row["place"], row["name"]): f"{row['ms']:.3f}" for row in result["attention"]}
        cells = [[place, *(ms.get((place, kernel), "") for kernel in kernels)] for place in places]
        text += "\n" + table(["attention, forward and backward, ms", *kernels], cells)
    return text


def masking(result: dict) -> str:
    """Return a Markdown table of what leaving masked patches out of the encoder saves, beside the paper's Table 2."""
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


# Sections in order: title, prefixes of the stages' names, function that makes a table; True: one table of all stages'
# results, below which their commands are listed, False: a table for each result, below its command.
SECTIONS = (
    ("Tests on the device", ("tests",), tests, False),
    ("What the device sustains", ("peaks",), peaks, False),
    ("A training step", ("step_", "finetune_", "probe_", "compiled_"), steps, True),
    ("Whole runs on photographs", ("train_",), trainings, True),
    ("What was tried to go faster", ("tuning",), tuning, False),
    ("What masking saves: the paper's Table 2", ("masking_",), masking, False),
)


def render(folder: Path) -> str:
    """Return all tables of a folder of results; a section without results says that it was not measured."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

    # Usually one machine ran everything, and is named once, at the top; otherwise each command's machine is named.
    machines = dict.fromkeys(describe_machine(stage) for stage in stages.values())
    text = "".join(f"\n{name}.\n" for name in machines)

    for title, prefixes, make_table, together in SECTIONS:
        matching = [stage for prefix in prefixes for name, stage in stages.items() if name.startswith(prefix)]
        runs = [
            f"{describe_machine(stage)}: {describe_run(stage)}" if len(machines) > 1 else describe_run(stage)
            for stage in matching
        ]
        text += f"\n### {title}\n\n"
        if not matching:
            text += "Not measured.\n"
        elif together:
            text += make_table([stage["result"] for stage in matching]) + "\n"
            text += "".join(f"- {run}\n" for run in runs)
        else:
            pairs = zip(matching, runs, strict=True)
            text += "\n".join(f"{run}:\n\n{make_table(stage['result'])}" for stage, run in pairs)
    return text


def main() -> None:
    """Print the tables, or replace those of a document."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="results of make bench-gpu, a JSON file per stage")
    parser.add_argument("--into", type=Path, help="document to change in place")
    args = parser.parse_args()
    if not list(args.folder.glob("*.json")):
        raise UserError(f"{args.folder} holds no results: make them with make bench-gpu")

    text = render(args.folder)
    if not args.into:
        print(text)
        return

    # Replace whatever stands between the two marks.
    begin, end = f"<!-- {args.folder.name} -->", f"<!-- end of {args.folder.name} -->"
    document = args.into.read_text()
    if begin not in document or end not in document.split(begin, 1)[1]:
        raise UserError(f'{args.into} has no lines "{begin}" and "{end}" to put the tables between')
    before, rest = document.split(begin, 1)
    after = rest.rsplit(end, 1)[1]
    args.into.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    errors.run(main)

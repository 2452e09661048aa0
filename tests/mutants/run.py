"""Try the tests on mutants of the project: copies with one small fault each, of which a test should fail.

    make mutants                                            40 mutants of each module, drawn by seed 1
    make mutants ARGS="--sample 10 --seed 2 --modules util/lars.py models_mae.py"

Each mutant is tried by the tests that touch its line, those first that killed others of its module, until one fails or
--seconds are over: the mutant is killed, or survives. torch is imported once; each mutant is a process that is forked
from there, in a copy of the repository. Every result is appended to OUTPUT/results.jsonl at once; mutants that it has
already are not tried again, so that a run that was cut off goes on; --again tries those that survived. Which test
touches what is measured first, by a run of the default tests that takes half an hour, and kept in OUTPUT/touching: only
test files that changed since are run again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist

import pytest
from mutations import Mutant, draw
from touching import Touching, load_or_measure

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = (
    *("models_mae.py", "models_vit.py", "engine_pretrain.py", "engine_finetune.py"),
    *(f"util/{name}.py" for name in ("optim", "lars", "lr_sched", "amp", "updater", "masking", "pos_embed", "rng")),
    *(f"util/{name}.py" for name in ("loop", "misc")),
)
FOLDERS = ("util/data", "util/checkpoint")


def modules() -> list[str]:
    """Return the paths of the modules that are mutated unless others are named."""
    return [
        *MODULES,
        *(str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))),
    ]


def key(module: str, mutant: Mutant) -> str:
    """Return the hash of a mutated module, under which its result is stored."""
    return hashlib.sha256(f"{module}\n{mutant.source}".encode()).hexdigest()[:16]


def copy_repository(target: Path) -> None:
    """Copy what git knows, and what it would add, to a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def import_libraries() -> None:
    """Import what takes long, once for all mutants, but nothing of the project, and start no threads."""
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def run_tests(folder: Path, tests: list[str], seconds: float) -> tuple[str, str]:
    """Run tests in a process that is forked from this one.

    Args:
        folder: Copy of the repository to run them in.
        tests: Test files and functions.
        seconds: Time after which the process is killed, which counts as a failure: faults can make code wait for ever.

    Returns:
        "killed" and the test that failed, or "survived" and "".
    """
    output = folder / ".output"
    child = os.fork()
    if not child:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os.chdir(folder)
        sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))]

        code = 2
        try:
            words = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
            code = int(pytest.main(words))
        finally:
            os._exit(code)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            _kill_group(child)
            failed = [
                line for line in output.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            if code == pytest.ExitCode.NO_TESTS_COLLECTED or (failed and "not found:" in failed[0]):
                raise RuntimeError(f"{failed or tests}: no such tests; remove OUTPUT/touching, and it is measured anew")
            outcome = "survived" if code == 0 else "killed"
            return outcome, failed[0].split(" - ")[0] if failed else ""
        time.sleep(0.05)
    _kill_group(child)
    os.waitpid(child, 0)
    return "killed", f"no end within {seconds:.0f} s"


def _kill_group(child: int) -> None:
    """Kill a process and all that it has started, as far as they are still there."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def choose(touching: Touching, module: str, line: int, killers: Counter, seconds: float) -> tuple[list[str], float]:
    """Choose the tests for a mutant.

    Args:
        touching: What touches what.
        module: Path of the module.
        line: Number of the line that is changed.
        killers: How many mutants of this module each test has killed: those that killed most come first.
        seconds: Time that the tests may take together; there is always at least one.

    Returns:
        The tests in the order in which they are to run, and the time that they take.
    """
    chosen, total = [], 0.0
    for test in sorted(touching.tests(module, line), key=lambda test: -killers[test]):
        took = touching.seconds.get(test, 0.0)
        if chosen and total + took > seconds:
            continue
        if test.partition("::")[0] not in chosen:
            chosen.append(test)
            total += took
    return chosen, total


def try_mutant(folder: Path, module: str, mutant: Mutant, tests: list[str], expected: float) -> dict:
    """Try tests, which take `expected` seconds, on a mutant, and return the result that is stored."""
    start = time.monotonic()
    outcome, by = "survived", "no test touches it"
    if tests:
        original = (folder / module).read_text()
        (folder / module).write_text(mutant.source)
        try:
            outcome, by = run_tests(folder, tests, 60 + 5 * expected)
        finally:
            (folder / module).write_text(original)
    result = {"key": key(module, mutant), "module": module, "line": mutant.line, "outcome": outcome, "by": by}
    took = round(time.monotonic() - start, 1)
    return result | {"before": mutant.before, "after": mutant.after, "tests": len(tests), "seconds": took}


def work(number: int, tasks: list[tuple[str, Mutant]], touching: Touching, args: argparse.Namespace) -> None:
    """Try every args.processes-th mutant, from `number` on, in a copy of the repository made for this process."""
    import_libraries()
    killers = defaultdict(Counter)
    for result in read_results(args.output).values():
        killers[result["module"]][killer(result)] += 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        copy_repository(folder)
        for module, mutant in tasks[number :: args.processes]:
            tests, expected = choose(touching, module, mutant.line, killers[module], args.seconds)
            result = try_mutant(folder, module, mutant, tests, expected)
            killers[module][killer(result)] += 1
            with (args.output / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{result['outcome']:9} {module}:{mutant.line}  {mutant.before[:60]}  ->  {mutant.after[:60]}",
                flush=True,
            )


def killer(result: dict) -> str:
    """Return the test function that killed a mutant, without its parameters; "" if there is none."""
    return result["by"].partition(" ")[2].partition("[")[0] if "::" in result["by"] else ""


def read_results(output: Path) -> dict[str, dict]:
    """Return the results so far, by key."""
    file = output / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def report(results: list[dict]) -> str:
    """Return the share of killed mutants, with its 95 % interval (Wilson), by module and in all, and the survivors."""
    if not results:
        return "no results"
    lines = []
    for module in sorted({result["module"] for result in results}):
        own = [result for result in results if result["module"] == module]
        lines.append(f"{module:40} {sum(result['outcome'] == 'killed' for result in own):4} of {len(own):4}")
    survivors = [result for result in results if result["outcome"] != "killed"]
    n, killed = len(results), len(results) - len(survivors)
    z, share = NormalDist().inv_cdf(0.975), killed / n
    centre, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    lines.append(f"killed {killed} of {n}: {share:.1%}, 95 % interval {low:.1%} to {high:.1%}")
    lines += [f"{r['module']}:{r['line']}  {r['before']}  ->  {r['after']}  ({r['by']})" for r in survivors]
    return "\n".join(lines)


def main() -> None:
    """Draw, try and report the mutants that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default=40, type=int, help="mutants of each module")
    parser.add_argument("--seed", default=1, type=int, help="of the draw")
    parser.add_argument(
        "--modules", nargs="+", default=modules(), help="default: models, engines, optimisers, data ..."
    )
    parser.add_argument("--seconds", default=60.0, type=float, help="of tests for a mutant")
    parser.add_argument("--processes", default=os.cpu_count(), type=int)
    parser.add_argument("--again", action="store_true", help="try the mutants that survived once more")
    parser.add_argument("--output", default=ROOT / "output" / "mutants", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    touching = load_or_measure(ROOT, args.output / "touching")

    # Mutants of different modules take turns, so that a run that is cut off has seen some of each.
    drawn = {
        module: draw((ROOT / module).read_text(), args.sample, random.Random(f"{args.seed} {module}"))
        for module in args.modules
    }
    tasks = [(module, drawn[module][n]) for n in range(args.sample) for module in drawn if n < len(drawn[module])]
    done = read_results(args.output)
    if args.again:
        done = {name: result for name, result in done.items() if result["outcome"] == "killed"}
    left = [(module, mutant) for module, mutant in tasks if key(module, mutant) not in done]
    print(f"{len(tasks)} mutants, {len(left)} of them to be tried", flush=True)
    context = multiprocessing.get_context("spawn")  # each worker imports torch itself
    workers = [context.Process(target=work, args=(n, left, touching, args)) for n in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    results = read_results(args.output)
    print(report([results[key(*task)] for task in tasks if key(*task) in results]))


if __name__ == "__main__":
    main()

"""Which tests touch which lines of the project, and how long they take, by coverage.py.

Every test file is run by itself, so that what its subprocesses execute is known to be the file's. What runs in the
test's own process is known to be the test function's.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Set
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData

CONFIG = """[run]
source = {root}
omit = tests/*, recipes/*, benchmarks/*, scripts/*, demo.py
parallel = true
relative_files = true
data_file = {data}
context = {context}
dynamic_context = test_function
patch = subprocess, fork, _exit
"""


class Touching:
    """Tests by the lines that they touch."""

    def __init__(self, lines: dict[str, dict[str, list[str]]], seconds: dict[str, float]) -> None:
        """Keep both tables.

        Args:
            lines: By module and line number: the test functions (tests/test_x.py::test_y) that execute it in their own
                process, and the test files that execute it in any other.
            seconds: Time that each test function, with all its parameters, and each test file takes.
        """
        self.lines, self.seconds = lines, seconds

    def tests(self, module: str, line: int) -> list[str]:
        """Return the tests that touch a line, functions before files, the fastest of each first.

        Lines that only an import executes, such as constants, belong to the functions that touch the module at all.
        """
        touched = self.lines.get(module, {})
        names = set(touched.get(str(line), ()))
        if not any("::" in name for name in names):
            names |= {name for others in touched.values() for name in others if "::" in name}
        return sorted(names, key=lambda name: ("::" not in name, self.seconds.get(name, 0.0)))


def load_or_measure(root: Path, folder: Path) -> Touching:
    """Return the tables of all test files; those that `folder` lacks, or that changed since, are run first.

    Args:
        root: The repository.
        folder: Folder of a JSON file per test file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, seconds = defaultdict(lambda: defaultdict(list)), {}
    for test in sorted((root / "tests").glob("test_*.py")):
        file, digest = folder / f"{test.stem}.json", hashlib.sha256(test.read_bytes()).hexdigest()
        found = json.loads(file.read_text()) if file.exists() else {}
        if found.get("sha256") != digest:
            print(f"measuring tests/{test.name}", flush=True)
            found = measure(root, test) | {"sha256": digest}
            file.write_text(json.dumps(found))
        seconds |= found["seconds"]
        for module, touched in found["lines"].items():
            for line, names in touched.items():
                lines[module][line] += names
    return Touching({module: dict(touched) for module, touched in lines.items()}, seconds)


def measure(root: Path, test: Path) -> dict:
    """Run a test file, and return its tables as in Touching: {"lines": ..., "seconds": ...}.

    Args:
        root: The repository.
        test: The file.
    """
    name, lines = f"tests/{test.name}", defaultdict(lambda: defaultdict(set))
    with tempfile.TemporaryDirectory() as temporary:
        data, config, times = (Path(temporary) / part for part in ("coverage", "config.ini", "times.xml"))
        config.write_text(CONFIG.format(root=root, data=data, context=name))
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", name, "-n", "2"]
        subprocess.run([*command, f"--junitxml={times}"], cwd=root, capture_output=True, check=False)
        seconds = _times(times, name)
        # A file without default tests would only be imported.
        for part in Path(temporary).glob("coverage.*") if len(seconds) > 1 else ():
            _add_lines(part, root, name, seconds.keys(), lines)
    plain = {module: {line: sorted(names) for line, names in found.items()} for module, found in lines.items()}
    return {"lines": plain, "seconds": seconds}


def _times(file: Path, name: str) -> dict[str, float]:
    """Return the seconds of each test function in pytest's XML file, and of the whole test file."""
    seconds = defaultdict(float)
    if file.exists():
        for case in ElementTree.fromstring(file.read_text()).iter("testcase"):
            seconds[f"{name}::{case.get('name').split('[')[0]}"] += float(case.get("time"))
    return dict(seconds) | {name: sum(seconds.values())}


def _add_lines(part: Path, root: Path, name: str, functions: Set[str], lines: dict) -> None:
    """Add what one process executed to the table.

    Args:
        part: Its file of coverage's data.
        root: The repository.
        name: The test file that ran.
        functions: Its test functions.
        lines: The table.
    """
    data = CoverageData(str(part))
    data.read()
    for file in data.measured_files():
        module = str(Path(file).relative_to(root)) if Path(file).is_absolute() else file
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                # "tests/test_x.py|test_x.test_y", or the first half alone. hypothesis calls its tests by other names.
                function = f"{name}::{context.rpartition('.')[2]}"
                lines[module][str(line)].add(function if function in functions else name)

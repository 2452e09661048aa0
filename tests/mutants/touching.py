"""Which tests touch which lines of the project, and how long they take, by coverage.py.

Every test file is run by itself, so that what its subprocesses execute is known to be the file's. What runs in the
test's own process is known to be the test function's.
"""

import json
import subprocess
import sys
from collections import defaultdict
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


def load_or_measure(root: Path, file: Path) -> Touching:
    """Return the tables that `file` holds, or make them by running the default tests, for about ten minutes."""
    if not file.exists():
        lines, seconds = measure(root, file.parent)
        file.write_text(json.dumps({"lines": lines, "seconds": seconds}))
    return Touching(**json.loads(file.read_text()))


def measure(root: Path, folder: Path) -> tuple[dict, dict]:
    """Run every test file by itself, and return the tables of Touching.

    Args:
        root: The repository.
        folder: For coverage's data.
    """
    lines, seconds = defaultdict(lambda: defaultdict(set)), {}
    for test in sorted((root / "tests").glob("test_*.py")):
        name = f"tests/{test.name}"
        print(f"measuring {name}", flush=True)
        data, config, times = (folder / f"{test.stem}.{ending}" for ending in ("coverage", "ini", "xml"))
        config.write_text(CONFIG.format(root=root, data=data, context=name))
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", name, "-n", "2"]
        subprocess.run([*command, f"--junitxml={times}"], cwd=root, capture_output=True, check=False)
        seconds |= _times(times, name)
        for part in folder.glob(f"{data.name}.*"):
            _add_lines(part, root, name, lines)
            part.unlink()
    plain = {module: {str(line): sorted(names) for line, names in found.items()} for module, found in lines.items()}
    return plain, seconds


def _times(file: Path, name: str) -> dict[str, float]:
    """Return the seconds of each test function in pytest's XML file, and of the whole test file."""
    seconds = defaultdict(float)
    if file.exists():
        for case in ElementTree.fromstring(file.read_text()).iter("testcase"):
            seconds[f"{name}::{case.get('name').split('[')[0]}"] += float(case.get("time"))
    return dict(seconds) | {name: sum(seconds.values())}


def _add_lines(part: Path, root: Path, name: str, lines: dict) -> None:
    """Add what one process executed to the table.

    Args:
        part: Its file of coverage's data.
        root: The repository.
        name: The test file that ran.
        lines: The table.
    """
    data = CoverageData(str(part))
    data.read()
    for file in data.measured_files():
        module = str(Path(file).relative_to(root)) if Path(file).is_absolute() else file
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                # "tests/test_x.py|test_x.test_y", or the first half alone.
                function = context.partition("|")[2].rpartition(".")[2]
                lines[module][line].add(f"{name}::{function}" if function.startswith("test") else name)

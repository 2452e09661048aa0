"""The mutation testing that `make mutants` runs: what it changes, and how it judges; needs mutmut."""

import random
import sys
from collections import Counter

import pytest
from conftest import ROOT

pytest.importorskip("mutmut", reason="installed by make mutants")
sys.path.insert(0, str(ROOT / "tests" / "mutants"))
import mutations
import run as tool
from touching import Touching

SOURCE = '''"""Doubles numbers."""

LIMIT: int = 3


def double(x: int) -> int:
    """Return twice the number; 2 is not changed in here."""
    if x > LIMIT:
        raise ValueError("too large, by 1")
    note(x)
    return 2 * x
'''


def test_each_mutant_differs_in_one_place_that_matters():
    drawn = mutations.draw(SOURCE, 1000, random.Random(0))
    changes = {(mutant.before, mutant.after) for mutant in drawn}
    assert {("3", "4"), ("> LIMIT", ">= LIMIT"), ("2", "3"), ("2 * x", "2 / x"), ("note(x)", "pass")} <= changes
    assert all('"""Doubles numbers."""' in mutant.source and "too large, by 1" in mutant.source for mutant in drawn)
    for mutant in drawn:
        compile(mutant.source, "mutant", "exec")
        differing = [a != b for a, b in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)]
        assert differing.index(True) == mutant.line - 1 and sum(differing) == 1


def test_a_seed_draws_the_same_mutants_again():
    draws = [[mutant.source for mutant in mutations.draw(SOURCE, 5, random.Random(seed))] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 5


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("assert double(1) == 2", ("survived", "")),
        ("assert double(1) == 3", ("killed", "FAILED tests/test_double.py::test_double")),
        ("import time; time.sleep(60)", ("killed", "no end within 3 s")),
    ],
)
def test_tests_are_tried_in_a_copy(body, expected, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "double.py").write_text(SOURCE.replace("    note(x)\n", ""))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (tmp_path / "tests" / "test_double.py").write_text(
        f"from double import double\n\n\ndef test_double():\n    {body}\n"
    )
    assert tool.run_tests(tmp_path, ["tests/test_double.py"], 3 if "sleep" in body else 60) == expected


def test_tests_that_touch_the_line_come_first_and_fit_into_the_time():
    lines = {"m.py": {"7": ["tests/a.py", "tests/b.py::test_1", "tests/b.py::test_2"], "1": ["tests/a.py"]}}
    seconds = {"tests/a.py": 30.0, "tests/b.py::test_1": 5.0, "tests/b.py::test_2": 1.0}
    touching = Touching(lines, seconds)
    assert touching.tests("m.py", 7) == ["tests/b.py::test_2", "tests/b.py::test_1", "tests/a.py"]
    assert touching.tests("m.py", 1) == touching.tests("m.py", 7) and not touching.tests("other.py", 1)
    assert tool.choose(touching, "m.py", 7, Counter(), 10) == (["tests/b.py::test_2", "tests/b.py::test_1"], 6.0)
    assert tool.choose(touching, "m.py", 7, Counter(), 0.1) == (["tests/b.py::test_2"], 1.0)
    killers = Counter(["tests/b.py::test_1"])
    assert tool.choose(touching, "m.py", 7, killers, 10) == (["tests/b.py::test_1", "tests/b.py::test_2"], 6.0)
    assert tool.killer({"by": "FAILED tests/b.py::test_1[a-b]"}) == "tests/b.py::test_1" and not tool.killer({"by": ""})


def test_the_report_states_the_interval_and_every_survivor():
    results = [
        {"module": "m.py", "line": n, "outcome": "killed", "before": "", "after": "", "by": ""} for n in range(90)
    ]
    results += [results[0] | {"outcome": "survived", "before": "a", "after": "b", "line": 7}] * 10
    said = tool.report(results)
    assert "killed 90 of 100: 90.0%, 95 % interval 82.6% to 94.5%" in said  # Wilson's, as tables have it
    assert said.count("m.py:7  a  ->  b") == 10

"""Benchmarks: each runs in its smallest form and writes the rows that its docstring names."""

import argparse
import json
import re

import pytest
import torch

from benchmarks import gpu, timing, train
from util.report.meters import Meters

pytestmark = pytest.mark.slow

TINY = {
    "masking": ("--models mae_vit_tiny_patch16 --batch_size 2 --steps 1 --device cpu", ["tokens", "8", "1"]),
    "loader": (
        "--data_path {images} --batch_size 8 --workers 1 --images 80 --repeat 1 --files 10000",
        ["classic", "ours", "tar", "decode", "finetune_classic", "finetune_ours", "finetune_no_aa"] * 2,
    ),
}


def test_failed_tests_are_a_failed_stage_and_folders_may_have_blanks(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    args = argparse.Namespace(output=tmp_path, quick=False, device="cpu", photos=tmp_path / "my photos")
    stage = gpu.Stage("tests", f"-m pytest -n 0 {tmp_path / 'test_it.py'}", "", 1)
    assert gpu.run(stage, args, 100).startswith("failed: 1 tests, done in")
    words = gpu.command(gpu.Stage("train", "train.py --data_path {photos}", "", 1), args, tmp_path / "found.json")
    assert words[:3] == ["train.py", "--data_path", str(tmp_path / "my photos")]


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_and_writes_its_rows(name, images, tmp_path, script):
    flags, expected = TINY[name]
    done = script(f"benchmarks/{name}.py", *flags.format(images=images).split(), "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row.get("row") or row["name"] for row in found] == expected
    assert all(row["images_per_s"] > 0 for row in found)


def test_the_gpu_benchmark_resumes_and_its_files_become_tables(script, tmp_path):
    """With --quick on a CPU, only the stage whose JSON file was removed runs again."""
    folder, document = tmp_path / "found (2)", tmp_path / "BENCHMARKS.md"
    words = ["benchmarks/gpu.py", "--quick", "--device", "cpu", "--output", folder]
    first = script(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    names = {path.stem for path in folder.glob("*.json")}
    assert names == {"tests", "peaks", "step_large", "train_large"}
    commands = [json.loads(path.read_text())["command"] for path in folder.glob("*.json")]
    assert not any(str(tmp_path.parent) in command or "/result" in command for command in commands)
    assert sum("--data_path PHOTOS" in command for command in commands) == 1
    (folder / "peaks.json").unlink()
    again = script(*words)
    assert re.search(r"peaks +done in", again.stdout) and again.stdout.count("skipped: has a result already") == 3
    late = script(*words, "--minutes", "0", "--stages", "peaks", "tests")
    (folder / "peaks.json").unlink()
    dropped = script(*words, "--minutes", "0", "--stages", "peaks", "tests")
    assert "dropped" not in late.stdout and re.search(r"peaks +dropped: 0 s", dropped.stdout)

    document.write_text("before\n<!-- found (2) -->\nstale\n<!-- end of found (2) -->\nafter\n")
    done = script("scripts/benchmark_tables.py", folder, "--into", document)
    assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith("before\n<!-- found (2) -->") and text.endswith("<!-- end of found (2) -->\nafter\n")
    rows = json.loads((folder / "step_large.json").read_text())["result"]["rows"]
    assert [row["name"] for row in rows] == ["ours", "off", "hf", "hf_best"]
    assert all(row["images_per_s"] > 0 for row in rows)
    rate = rows[0]["images_per_s"]
    assert f"| ours | {rate:.0f} | 1.00 |" in text and "stale" not in text and "Not measured." in text


def test_the_rates_of_a_slow_run_are_read(capsys, monkeypatch):
    """A run prints its rate with a decimal point where it is below ten images per second."""
    # The clock moves on by 1 s whenever it is read.
    monkeypatch.setattr("time.perf_counter", iter(range(100)).__next__)
    meters = Meters(torch.device("cpu"), images_per_step=8, flops_per_image=5e9)
    list(meters.log_every(["batch"] * 3, print_freq=1, epoch=0))
    rates = [float(rate) for rate, _ in train.LINE.findall(capsys.readouterr().out)]
    assert len(rates) == 3 and all(0 < rate < 10 for rate in rates)


def test_a_row_that_does_not_fit_is_left_out_of_the_turns(capsys):
    def too_large():
        raise timing.GpuFull

    seconds = iter(range(100))
    times = timing.take_turns({"fits": lambda: next(seconds), "large": too_large}, repetitions=3, warm_ups=2)
    assert times == {"fits": [2, 3, 4]} and "the row large is left out" in capsys.readouterr().out

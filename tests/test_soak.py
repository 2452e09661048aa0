"""Soak test: 40 short epochs of a run that is killed again and again (minutes; pytest -m soak)."""

import random
import re

import faults
import pytest
from runs import EVERY_STEP, assert_same_end, job_argv

EPOCHS, KEEP = 40, 3


@pytest.mark.soak
def test_40_epochs_under_kill_9(images, tmp_path):
    """The run ends as an undisturbed one, and leaves --keep checkpoints, the best and the last."""
    flags = ["--patch_size", 7, "--epochs", EPOCHS, "--keep", KEEP, "--num_workers", 0]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = faults.start("finetune", job_argv(images, tmp_path / "whole", *flags, job="finetune"), tmp_path / "out")
    assert faults.exit_code(whole, 600) == 0, (tmp_path / "out").read_text()[-3000:]

    chance, kills = random.Random(0), 0
    while True:
        often = EVERY_STEP if chance.random() < 0.2 else []
        argv = job_argv(images, tmp_path / "cut", *flags, *often, "--resume", "auto", job="finetune")
        process = faults.start("finetune", argv, tmp_path / "out")
        process.join(chance.uniform(0.5, 5))
        if process.exitcode is None:
            process.kill()
            kills += 1
        code = faults.exit_code(process)
        if code == 0:
            break
        assert code == -9, (tmp_path / "out").read_text()[-3000:]
    print(f"{kills} kills")
    assert kills >= 4
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    left = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
    best = int(re.findall(r"best accuracy so far: \S+ %, after epoch (\d+)", (tmp_path / "out").read_text())[-1])
    epochs = {best, *range(EPOCHS - KEEP, EPOCHS)}
    assert left == sorted(f"checkpoint-{name}.pth" for name in (*epochs, "last"))

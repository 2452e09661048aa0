"""Helpers of the tests: small runs of the three jobs, and comparison of their ends."""

import json
import re
import time

import faults
import pytest
import torch

COMMON = "--input_size 28 --patch_size 7 --warmup_epochs 1 --amp off --device cpu"
CLASSIFY = f"{COMMON} --model vit_demo_patch4 --nb_classes 10 --batch_size 16 --epochs 2"
FLAGS = {
    "pretrain": f"{COMMON} --model mae_vit_demo_patch4 --batch_size 8 --accum_iter 2 --epochs 3 --blr 0.05",
    "finetune": f"{CLASSIFY} --blr 0.01 --mixup 0.8 --cutmix 1.0",
    "linprobe": f"{CLASSIFY} --blr 1",
}
EVERY_STEP = ["--save_minutes", "0.00001"]  # saves after every update


def job_argv(images, out, *more, job="pretrain"):
    """Return the command line of a small run, which saves every epoch unless more flags say otherwise."""
    return [*FLAGS[job].split(), "--data_path", images, "--output_dir", out, "--save_freq", "1", *more]


def state(folder, name="last"):
    """Load checkpoint-{name}.pth."""
    return torch.load(folder / f"checkpoint-{name}.pth", weights_only=True)


def same(a, b):
    """Tell whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(folder, undisturbed):
    """Assert that two runs ended with the same weights, optimiser and random states, and the same epochs in log.txt."""
    end, expected = state(folder), state(undisturbed)
    assert end["epoch"] == expected["epoch"]
    for part in ("model", "optimizer", "rng"):
        assert same(end[part], expected[part]), part
    assert log(folder).keys() == log(undisturbed).keys()
    for epoch, line in log(undisturbed).items():
        assert log(folder)[epoch] == pytest.approx(line, rel=1e-5)


def log(folder):
    """Return the lines of log.txt by epoch, without times; assert that every epoch has one line."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        for name in ("data_wait", "tflops"):  # times differ from run to run
            line.pop(name, None)
    assert [line["epoch"] for line in lines] == list(range(len(lines))), "an epoch is missing or there twice"
    return {line["epoch"]: line for line in lines}


def finish(images, folder, *more, job="pretrain"):
    """Run a job with --resume auto to its end, in a process of its own; return its output."""
    process = faults.start(job, job_argv(images, folder, "--resume", "auto", *more, job=job), folder / "out")
    assert faults.exit_code(process) == 0, (folder / "out").read_text()[-3000:]
    return (folder / "out").read_text()


def wait_for(path, text, timeout=60):
    """Wait until a file contains a match of the regular expression `text`."""
    end = time.time() + timeout
    while time.time() < end:
        if path.exists() and re.search(text, path.read_text()):
            return
        time.sleep(0.02)
    raise TimeoutError(path.read_text()[:2000] if path.exists() else f"no {path}")

"""Small runs of the three jobs, and whether two of them ended alike."""

import json
import re
import time

import faults
import pytest
import torch

COMMON = "--input_size 28 --warmup_epochs 1 --amp off --device cpu"
CLASSIFY = f"{COMMON} --model vit_demo_patch4 --nb_classes 10 --batch_size 16 --epochs 2"
FLAGS = {
    "pretrain": f"{COMMON} --model mae_vit_demo_patch4 --batch_size 8 --accum_iter 2 --epochs 3 --blr 0.05",
    "finetune": f"{CLASSIFY} --blr 0.01 --mixup 0.8 --cutmix 1.0",
    "linprobe": f"{CLASSIFY} --blr 1",
}
EVERY_STEP = ["--save_minutes", "0.00001"]


def words(images, out, *more, job="pretrain"):
    more = ["--save_freq", "1", *more]
    return [*FLAGS[job].split(), "--data_path", images, "--output_dir", out, *more]


def state(folder, name="last"):
    return torch.load(folder / f"checkpoint-{name}.pth", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(folder, undisturbed):
    """Parameters, optimiser and random streams of the last checkpoint, and the epochs of log.txt."""
    ours, theirs = state(folder), state(undisturbed)
    assert ours["epoch"] == theirs["epoch"]
    for part in ("model", "optimizer", "rng"):
        assert same(ours[part], theirs[part]), part
    assert log(folder).keys() == log(undisturbed).keys()
    for epoch, line in log(undisturbed).items():
        assert log(folder)[epoch] == pytest.approx(line, rel=1e-5)


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        del line["data_wait"]  # a time
    assert [line["epoch"] for line in lines] == list(range(len(lines))), "an epoch is missing or there twice"
    return {line["epoch"]: line for line in lines}


def finish(images, folder, *more, job="pretrain"):
    process = faults.start(job, words(images, folder, "--resume", "auto", *more, job=job), folder / "out")
    assert faults.ended(process) == 0, (folder / "out").read_text()[-3000:]
    return (folder / "out").read_text()


def wait_for(path, text, timeout=60):
    """Until a file holds the text."""
    end = time.time() + timeout
    while time.time() < end:
        if path.exists() and re.search(text, path.read_text()):
            return
        time.sleep(0.02)
    raise TimeoutError(path.read_text()[:2000] if path.exists() else f"no {path}")

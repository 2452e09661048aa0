"""What several tests share: a small folder of real images, and scripts run as whole processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples" / "fashion_mnist"


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An ImageFolder of 8 training and 3 validation images of each of the 10 classes, linked from the samples."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 3)):
        for folder in sorted((SAMPLES / split).iterdir()):
            target = root / split / folder.name
            target.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (target / file.name).symlink_to(file)
    return root


@pytest.fixture
def script():
    """Run a command of Python's in the repository; returns the finished process with its output as text."""

    def run(*words: object, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, **env},
        )  # fmt: skip

    return run

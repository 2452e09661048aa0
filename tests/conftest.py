"""What several tests share: a small folder of real images, and scripts run as whole processes."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.register_assert_rewrite("runs")  # so that its asserts say as much as a test's

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples" / "fashion_mnist"


def link(source: Path, target: Path, classes: int | None = None, count: int | None = None) -> None:
    """A split of links to another's images: of the first classes the first count each."""
    for folder in sorted(source.iterdir())[:classes]:
        (target / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:count]:
            (target / folder.name / file.name).symlink_to(file.resolve())


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An ImageFolder of 8 training and 3 validation images of each of the 10 classes, linked from the samples."""
    root = tmp_path_factory.mktemp("images")
    link(SAMPLES / "train", root / "train", count=8)
    link(SAMPLES / "val", root / "val", count=3)
    return root


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory) -> Path:
    """One folder per job, of runs that nothing happened to."""
    from runs import FLAGS, finish, log  # starts the server of processes: only where it is needed

    root = tmp_path_factory.mktemp("undisturbed")
    for job in FLAGS:
        (root / job).mkdir()
        finish(images, root / job, "--num_workers", 0, job=job)
    assert log(root / "pretrain")[2]["train_loss"] < log(root / "pretrain")[0]["train_loss"]
    return root


@pytest.fixture
def script():
    """Run a command of Python's in the repository; returns the finished process with its output as text."""

    def run(*words: object, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **env},
        )

    return run


@pytest.fixture
def refusal(capsys):
    """Run a script's main() in this process, to its exit with code 2; returns the message."""
    from util import errors

    def run(main) -> str:
        with pytest.raises(SystemExit) as end:
            errors.run(main)
        said = capsys.readouterr()
        assert end.value.code == 2 and "Traceback" not in said.out + said.err
        return said.err

    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path on loopback; torch.hub's cache lies in a folder of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()

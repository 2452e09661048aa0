"""What several test files share: a folder of real images, runs to compare with, scripts as processes, a server.

Two hooks of pytest say how many workers run the tests, and which test comes first.
"""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

# Workers of pytest-xdist share the cores: one thread each, and for the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest.register_assert_rewrite("runs")  # for messages as detailed as those of a test's own assertions

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples" / "fashion_mnist"


def pytest_xdist_auto_num_workers() -> int:
    """Take a worker more than there are cores, since a third of the tests' time is waiting; at most 8."""
    from util.resources import cores

    return min(cores() + 1, 8)


def pytest_collection_modifyitems(items):
    """Start with the files whose tests take longest, so that no worker waits for one of them at the end."""
    longest = ("test_demo.py", "test_soak.py", "test_benchmarks.py", "test_recipes.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def link_images(source: Path, target: Path, classes: int | None = None, count: int | None = None) -> None:
    """Make a folder of links to another's images.

    Args:
        source: Folder with a folder of images per class.
        target: Folder to make, of the same form.
        classes: Number of classes, the first ones; None: all.
        count: Number of images of each class, the first ones; None: all.
    """
    for folder in sorted(source.iterdir())[:classes]:
        (target / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:count]:
            (target / folder.name / file.name).symlink_to(file.resolve())


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Folder of 8 training and 3 validation images of each of 10 classes, linked from the samples."""
    root = tmp_path_factory.mktemp("images")
    link_images(SAMPLES / "train", root / "train", count=8)
    link_images(SAMPLES / "val", root / "val", count=3)
    return root


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory) -> Path:
    """Folder with the output folders of a run of each job without interruption."""
    from runs import FLAGS, finish, log  # its import starts the fork server: only where it is needed

    root = tmp_path_factory.mktemp("undisturbed")
    for job in FLAGS:
        (root / job).mkdir()
        finish(images, root / job, "--num_workers", 0, job=job)
    assert log(root / "pretrain")[2]["train_loss"] < log(root / "pretrain")[0]["train_loss"]
    return root


@pytest.fixture(scope="session")
def packed(images, tmp_path_factory) -> Path:
    """Folder of several shards, as scripts/pack.py makes them of the training images."""
    from packs import SMALL, run

    folder = tmp_path_factory.mktemp("packed") / "train"
    run(images / "train", "--output", folder, "--shard_size", SMALL)
    return folder


@pytest.fixture(scope="module")
def encoder() -> dict[str, torch.Tensor]:
    """Weights of an encoder of the demo's size for 8 x 8 pixels, without head."""
    import models_vit

    torch.manual_seed(0)
    state = models_vit.vit_demo_patch4(img_size=8, num_classes=0, global_pool=False).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


@pytest.fixture
def arrow():
    """Module pyarrow; without it the test is skipped."""
    pytest.importorskip("pyarrow.parquet")
    return sys.modules["pyarrow"]


@pytest.fixture
def script():
    """Function that runs Python in the repository, as a process of its own.

    It takes the command line after "python", and as keywords a timeout in seconds and environment variables; it
    returns the completed process, with its output as text.
    """

    def run(*argv: object, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **env},
        )

    return run


@pytest.fixture
def refusal(capsys):
    """Function that runs a script's main() in this process, asserts that it exits with code 2, returns the message."""
    from util import errors

    def run(main) -> str:
        with pytest.raises(SystemExit) as end:
            errors.run(main)
        printed = capsys.readouterr()
        assert end.value.code == 2 and "Traceback" not in printed.out + printed.err
        return printed.err

    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of an HTTP server for the files in tmp_path; torch.hub's cache lies in a folder of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()

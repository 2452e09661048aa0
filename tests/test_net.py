"""Two hosts (tests/hosts.sh) with torchrun on each; one is cut off and comes back.

To run as root: pytest -m net
"""

import os
import shutil
import signal
import subprocess
import sys

import faults
import pytest
from conftest import ROOT
from runs import assert_same_end, job_argv, wait_for

pytestmark = pytest.mark.net
FLAGS = ["--batch_size", 4, "--num_workers", 0, "--epochs", 40, "--dist_timeout", 0.15, "--resume", "auto"]


def run_hosts_script(action):
    return subprocess.run([ROOT / "tests" / "hosts.sh", action], capture_output=True, text=True)


@pytest.fixture
def network():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and Debian's iproute2")
    done = run_hosts_script("up")
    if done.returncode:
        pytest.skip(f"no network namespaces here: {done.stderr}")
    yield
    run_hosts_script("down")


def start_torchrun(host, out, *argv):
    """Start torchrun on a host, in a process group of its own; append its output to a file."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        2,
        "--nproc_per_node",
        1,
        "--max-restarts",
        20,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "10.77.0.1:29400",
        "--rdzv_id",
        "mae",
        "--rdzv_conf",
        f"is_host={int(host == 'a')}",
        "--local_addr",
        "10.77.0.1" if host == "a" else "10.77.0.2",
    ]
    with out.open("a") as file:
        return subprocess.Popen(
            list(map(str, ["ip", "netns", "exec", f"mae-{host}", sys.executable, *torchrun, *argv])),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "GLOO_SOCKET_IFNAME": f"mae-v{host}",
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )


def test_a_node_that_was_cut_off_comes_back_and_the_run_ends_as_undisturbed(network, images, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    faults.run_ranks("pretrain", job_argv(images, whole, *FLAGS), tmp_path)
    argv = ["main_pretrain.py", *job_argv(images, folder, *FLAGS)]
    nodes = {host: start_torchrun(host, tmp_path / host, *argv) for host in "ab"}
    try:
        wait_for(folder / "log.txt", '"epoch": 3')
        assert run_hosts_script("cut").returncode == 0
        for pid in subprocess.run(["ip", "netns", "pids", "mae-b"], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        nodes["b"].wait(30)
        wait_for(tmp_path / "a", "lost another process", 60)
        assert run_hosts_script("mend").returncode == 0
        nodes["b"] = start_torchrun("b", tmp_path / "b", *argv)
        codes = [nodes[host].wait(180) for host in "ab"]
        said = (tmp_path / "a").read_text() + (tmp_path / "b").read_text()
        assert codes == [0, 0], said[-4000:]
        assert "resuming from" in said
        assert_same_end(folder, whole)
    finally:
        for process in nodes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

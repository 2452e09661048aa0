"""What processes need: each other's statistics, open files, an address to meet at, a folder for downloads."""

import errno
import os
import pwd
import resource
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import faults
import pytest
import ranks
import torch
from runs import job_argv

import engine_finetune
import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util import checks, errors, resources
from util.amp import LossScaler
from util.checkpoint import files
from util.checkpoint.files import load_checkpoint
from util.data import datasets, loaders
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import CentreCrop
from util.distributed import dist
from util.errors import UserError
from util.lr_sched import CosineSchedule
from util.report import monitor
from util.updater import Updater

CPU = torch.device("cpu")

# The probe's BatchNorm.


def trained_probe(attentive, heads, accum, amp):
    """Return the state after two updates by SGD, each with 12 images shared by the ranks, and the mean loss."""
    torch.manual_seed(0)
    model = models_vit.MODELS["vit_demo_patch4"](img_size=28, num_classes=5, global_pool=False)
    model = models_vit.make_linear_probe(model, heads, attentive)
    draw = torch.Generator().manual_seed(1)
    share = slice(dist.rank(), None, dist.world_size())
    batches = [
        part
        for _ in range(2)
        for part in zip(
            # Other brightness and contrast in every image, so that the ranks' own statistics differ.
            (torch.randn(12, 3, 28, 28, generator=draw) * torch.arange(12)[:, None, None, None])[share].chunk(accum),
            torch.randint(5, (12,), generator=draw)[share].chunk(accum),
            strict=True,
        )
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped = dist.wrap(model, CPU, static_graph=accum == 1)
    updater = Updater(wrapped, optimizer, CosineSchedule(0.1, 0.0, 0, 20), LossScaler(amp, CPU), accum_iter=accum)
    stats = engine_finetune.train_one_epoch(wrapped, engine_finetune.head_losses, batches, updater, 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    state = model.state_dict()
    return {name: state[name] for name in [*trained, *(name for name in state if name.startswith("head.0."))]}, stats


PROBES = [
    (False, 1, 1, "off"),
    (False, 3, 3, "off"),
    (True, 1, 1, "off"),
    (True, 1, 3, "off"),
    (False, 1, 1, "bf16"),
    (True, 1, 1, "bf16"),
]


def trained_probes(probes):
    return [trained_probe(*probe) for probe in probes]


@pytest.mark.parametrize(("world", "probes"), [(2, PROBES), (4, [probe for probe in PROBES if probe[2] == 1])])
def test_a_probe_on_several_ranks_trains_as_on_one(world, probes, tmp_path):
    """Statistics, weights (of the attentive pooling, too) and loss are those of one process with the same images."""
    alone = trained_probes(probes)
    for ends in ranks.run(world, tmp_path, trained_probes, probes):
        for (state, stats), (expected, expected_stats), probe in zip(ends, alone, probes, strict=True):
            # In bf16 the gradients themselves are rounded, on each rank anew.
            limit = 1e-5 if probe[3] == "off" else 3e-3
            assert stats["loss"] == pytest.approx(expected_stats["loss"], abs=limit), probe
            assert state.keys() == expected.keys() and len(state) > 4
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, rtol=limit, atol=limit, msg=f"{name} of {probe}")


def test_alone_and_in_evaluation_the_probes_batchnorm_is_torchs():
    own, torchs = models_vit.BatchNormOverRanks(6, affine=False), torch.nn.BatchNorm1d(6, affine=False)
    for features in torch.randn(3, 4, 6):
        assert torch.equal(own(features), torchs(features))
    assert all(torch.equal(value, torchs.state_dict()[name]) for name, value in own.state_dict().items())
    assert torch.equal(own.eval()(features[:1]), torchs.eval()(features[:1]))


@pytest.mark.parametrize(
    ("job", "flags", "refused"),
    [
        (main_linprobe, "--batch_size 1", True),
        (main_linprobe, "--batch_size 1 --accum_iter 16 --probe attentive", True),
        (main_linprobe, "--batch_size 1 --eval --resume x.pth", False),
        (main_linprobe, "--batch_size 2", False),
        (main_finetune, "--batch_size 1", False),
    ],
)
def test_a_probe_is_not_trained_on_batches_of_one(job, flags, refused):
    problems = checks.flag_problems(job.get_args([*flags.split(), "--data_path", "x"]), models_vit.MODELS)
    assert any(text.startswith("--batch_size 1: the probe's BatchNorm needs") for text in problems) == refused


# Open files.


def run_with_open_files(job, argv, soft, hard, out):
    """Run a job in this process with limits of open files, which count from those that are open at the start."""
    with Path(out).open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    resources.cores = lambda: 64
    open_now = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + soft, open_now + hard))
    errors.run(lambda: faults.MAINS[job](argv))


@pytest.mark.parametrize(
    ("job", "workers", "soft", "hard", "code"),
    [
        ("pretrain", 3, 9, 58, 2),  # where it once hung
        pytest.param("linprobe", 1, 20, 20, 2, marks=pytest.mark.slow),
        pytest.param("finetune", 0, 5, 5, 2, marks=pytest.mark.slow),
        ("pretrain", 3, 9, 64, 0),  # as many as three loader processes are said to need, or a few more
        pytest.param("finetune", 1, 20, 40, 0, marks=pytest.mark.slow),
    ],
)
def test_a_low_limit_of_open_files_is_raised_or_a_message(job, workers, soft, hard, code, images, tmp_path):
    more = ["--monitor_freq", 1] if job == "pretrain" else []
    argv = job_argv(images, tmp_path / "o", "--num_workers", workers, "--epochs", 2, *more, job=job)
    process = faults.process(run_with_open_files, job, [str(word) for word in argv], soft, hard, tmp_path / "out")
    assert faults.exit_code(process, 60) == code
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said
    if code:
        assert said.count("\n") == 1 and "ulimit -n" in said and f"--num_workers {workers}" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "photo.jpg"),
        OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
        OSError("Caught OSError in DataLoader worker process 1.\nOSError: [Errno 24] Too many open files: 'a.png'"),
        RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"),
        RuntimeError("received 0 items of ancdata"),
        ImportError("libz.so.1: cannot open shared object file: Too many open files"),
    ],
)
def test_too_many_open_files_is_a_message(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        errors.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and "ulimit -n" in said and "--num_workers" in said


def test_monitoring_keeps_no_file_open_for_a_batch(images):
    """What a loader process sends is shared memory, an open file for each tensor that is kept."""
    train = datasets.open_split(
        datasets.Images, DataSpec(str(images)), "train", None, PixelSpec(), classes_optional=True
    )
    views = loaders.monitor_loaders(DataSpec(str(images)), train, CentreCrop(28), loaders.Loading(1, 1, False, 0, CPU))
    watch = monitor.Monitor(*views, "", None, LossScaler("off", CPU), monitor.FixedMasks(0.75, "random", 0))
    counts = []
    watch(models_mae.mae_vit_demo_patch4(img_size=28), 0, lambda: counts.append(len(list(Path("/dev/fd").iterdir()))))
    assert len(counts) == 110 and max(counts) - counts[0] < 20, counts


# Joining the group at an address where something else answers.


def answer_nothing(connection):
    time.sleep(60)


def answer_a_byte_a_second(connection):
    while True:
        connection.sendall(b"\x01")
        time.sleep(1)


def answer_http(connection):
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno\n")
    connection.close()


def answer_with_what_was_said(connection):
    while said := connection.recv(1000):
        connection.sendall(said)


def answer_with_zeros(connection):
    connection.sendall(bytes(1_000_000))
    time.sleep(60)


def hang_up(connection):
    connection.close()


ANSWERS = [answer_nothing, answer_a_byte_a_second, answer_http, answer_with_what_was_said, answer_with_zeros, hang_up]


def serve(answer):
    """Open a server on a free port that answers every connection in its own thread; return the listening socket."""
    listening = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=quietly, args=(connection,), daemon=True).start()

    def quietly(connection):
        with suppress(OSError):  # the process has gone
            answer(connection)

    threading.Thread(target=accept, daemon=True).start()
    return listening


def join_group(rank, port, minutes, out):
    """Join a group of two in this process, with its output in a file."""
    with Path(out).open("w") as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.JOIN_GRACE_S = 2.0
    errors.run(lambda: dist.init("cpu", 0, timeout_minutes=minutes))


def test_joining_ends_in_time_whatever_answers_at_the_address(tmp_path):
    """Rank 1 meets servers that are no rank 0, and rank 0 finds its port taken by one; all at the same time."""
    servers = [serve(answer) for answer in ANSWERS]
    ports = [server.getsockname()[1] for server in servers]
    cases = [(1, port, answer.__name__) for port, answer in zip(ports, ANSWERS, strict=True)]
    cases += [(0, ports[0], "rank-0")]
    start = time.monotonic()
    processes = [faults.process(join_group, rank, port, 0.02, tmp_path / name) for rank, port, name in cases]
    codes = [faults.exit_code(process, 30) for process in processes]
    assert codes == [1] * len(cases) and time.monotonic() - start < 15
    for rank, port, name in cases:
        said = (tmp_path / name).read_text()
        assert f"rank {rank} of 2 could not join the process group at 127.0.0.1:{port} within 1.2 s" in said, name
        assert "Traceback" not in said and said.count("error:") == 1, name


def test_ctrl_c_ends_the_wait_for_rank_0(tmp_path):
    server = serve(answer_nothing)
    process = faults.process(join_group, 1, server.getsockname()[1], 10, tmp_path / "out")
    end = time.monotonic() + 20
    while not (tmp_path / "out").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    assert faults.exit_code(process, 10) == 130


# Downloads without a folder to keep them in.


def raising(error):
    def download(*_, **__):
        raise error

    return download


@pytest.mark.parametrize("home", ["file", "file/below", "~no-such-user/cache", "", "x" * 300])
def test_a_download_that_cannot_be_kept_names_the_folder_and_its_variable(home, server, tmp_path, monkeypatch):
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "web.pth")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", home)
    if not home:  # neither HOME nor an entry among the system's users
        for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", raising(KeyError("uid not found")))
    before = set(tmp_path.iterdir())
    with pytest.raises(
        UserError, match="cannot keep the download in .*checkpoints: .*Set TORCH_HOME to a folder"
    ) as said:
        load_checkpoint(f"{server}/web.pth")
    assert (home or "~/.cache/torch") in str(said.value) and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_download_is_named(number, server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", raising(OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match=f"cannot keep the download in {tmp_path}/cache/.*{os.strerror(number)}. Set"):
        load_checkpoint(f"{server}/web.pth")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_shows_how_far_a_download_is(rank, server, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: shown.append(progress))
    files._fetch(f"{server}/web.pth", tmp_path / "web.pth")
    assert shown == [rank == 0]


def test_an_address_that_cannot_be_read_is_not_the_folders_fault(server):
    for address in (f"{server}/missing.pth", "http://127.0.0.1:9/x.pth"):
        with pytest.raises(UserError, match=f"cannot download {address}: .*Check the address"):
            load_checkpoint(address)


def test_pretraining_goes_on_without_a_home(images, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", raising(KeyError("uid not found")))
    main_pretrain.main([str(word) for word in job_argv(images, tmp_path / "o", "--num_workers", 0, "--epochs", 2)])
    assert (tmp_path / "o" / "checkpoint-1.pth").is_file()

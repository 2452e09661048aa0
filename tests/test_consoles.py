"""Names in any bytes, and consoles of any encoding, closed, full or gone."""

import csv
import errno
import os
import subprocess
import sys
import zlib
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, link_images
from runs import job_argv, log

import main_export
import main_features
import main_finetune
import main_predict
import main_pretrain
import main_reconstruct
from util import console, errors, masking

LATIN = os.fsdecode(b"caf\xe9")  # ISO 8859-1 on the disk
BROKEN = os.fsdecode(b"\xff\xfe bild\x80")  # no encoding at all


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Folder whose name, class folders and files are not UTF-8, with a classifier trained on it."""
    root = tmp_path_factory.mktemp("odd")
    source = ROOT / "samples" / "fashion_mnist"
    for split in ("train", "val"):
        link_images(source / split, root / LATIN / split, classes=10, count=4)
        first, second = sorted((root / LATIN / split).iterdir())[:2]
        for number, file in enumerate(sorted(first.iterdir())[:2]):
            file.rename(first / f"{(LATIN, BROKEN)[number]}.png")
        second.rename(second.with_name(BROKEN))
    out = root / f"out {LATIN}"
    main_finetune.main(argv("finetune", root / LATIN, out, "--confusion", out / f"{LATIN}.csv", "--epochs", 1))
    return root


def argv(job, data, out, *more):
    return [str(word) for word in job_argv(data, out, "--num_workers", 0, "--warmup_epochs", 0, *more, job=job)]


def test_pretraining_looks_at_names_of_any_bytes_and_resumes(odd, tmp_path):
    out = tmp_path / BROKEN
    main_pretrain.main(argv("pretrain", odd / LATIN, out, "--monitor_freq", 1, "--epochs", 1))
    main_pretrain.main(
        argv("pretrain", odd / LATIN, out, "--monitor_freq", 1, "--epochs", 2, "--resume", "auto", "--resume_override")
    )
    assert set(log(out)) == {0, 1} and log(out)[1]["test_loss"] > 0
    assert len(list(out.glob("events.out.tfevents.*"))) == 2
    assert len(list(out.glob("reconstructions/*.png"))) == 2


def test_scripts_write_names_by_which_the_files_are_found(odd, tmp_path):
    checkpoint, val = str(odd / f"out {LATIN}" / "checkpoint-0.pth"), odd / LATIN / "val"
    main_predict.main(["--resume", checkpoint, "--images", str(val), "--output", str(tmp_path / f"{LATIN}.csv")])
    with (tmp_path / f"{LATIN}.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and all(Path(row["file"]).is_file() for row in rows)
    main_features.main(["--resume", checkpoint, "--data_path", str(val), "--output", str(tmp_path / f"{LATIN}.npz")])
    stored = np.load(tmp_path / f"{LATIN}.npz")
    assert all((val / name).is_file() for name in stored["files"]) and BROKEN in stored["classes"]
    back = str(tmp_path / f"timm {BROKEN}")
    main_export.main(["--resume", checkpoint, "--to", "timm", "--output", back])
    main_predict.main(["--resume", back, "--images", str(val), "--output", str(tmp_path / "again.csv")])
    assert r"caf\udce9" in (tmp_path / f"timm {BROKEN}" / "README.md").read_text(encoding="utf-8")


def test_reconstructions_of_names_of_any_bytes(odd, tmp_path, images):
    main_pretrain.main(argv("pretrain", images, tmp_path, "--monitor_freq", 0, "--epochs", 1))
    main_reconstruct.main(
        ["--resume", str(tmp_path / "checkpoint-0.pth"), "--images", str(odd / LATIN / "val"), "--num", "99"]
        + ["--output", str(tmp_path / f"{LATIN}.png")]
    )
    assert (tmp_path / f"{LATIN}.png").is_file()


def test_the_confusion_matrix_names_every_class(odd):
    file = odd / f"out {LATIN}" / f"{LATIN}.csv"
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        assert BROKEN in [row["class"] for row in csv.DictReader(lines)]


def test_masks_of_names_in_utf8_are_those_of_earlier_versions():
    noise = masking.fixed_noise("random", ["bag/00018.png", "größe/図.png"], 0, (2, 2), torch.device("cpu"))
    seeds = [zlib.crc32(name) for name in (b"0 bag/00018.png", "0 größe/図.png".encode())]
    expected = [torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(noise, torch.cat(expected))


# Consoles.


@pytest.fixture(scope="module")
def predict(odd, images, tmp_path_factory):
    """Command line that predicts a few images, and the file that it writes."""
    out = tmp_path_factory.mktemp("predict") / "p.csv"
    resume = str(odd / f"out {LATIN}" / "checkpoint-0.pth")
    return [
        sys.executable,
        "main_predict.py",
        "--resume",
        resume,
        "--images",
        str(images / "val"),
        "--output",
        str(out),
    ]


@pytest.mark.slow  # a start takes seconds
@pytest.mark.parametrize("stream", ["gone", "full", "both closed", "closed", "latin-1", "ascii"])
def test_no_console_ends_a_script(stream, predict):
    """Whatever becomes of stdout, the exit code is 0, the file is whole, and nothing is said on stderr."""
    output = Path(predict[-1])
    output.unlink(missing_ok=True)
    # Buffered, text fails only when Python flushes it at its end.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shell = {"full": ">/dev/full", "closed": ">&-", "both closed": ">&- 2>&-"}.get(stream, "")
    if stream in ("ascii", "latin-1"):
        env["PYTHONIOENCODING"] = stream
    command = " ".join(f"'{word}'" for word in map(os.fsdecode, predict)) + f" {shell}"
    if stream == "gone":
        command = f"( {command}; echo code $? >&2 ) | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, timeout=120)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0 and said in ("", "code 0\n"), said
    assert output.read_bytes().count(b"\n") == 31


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&-"])
def test_closed_descriptors_are_not_given_to_the_next_file(closed, tmp_path):
    code = f"""if True:
        from util.console import tolerant_console
        import os
        with tolerant_console(), open({str(tmp_path / "found")!r}, "w") as file:
            file.write(str(file.fileno()))
            for descriptor in (1, 2):
                assert os.get_inheritable(descriptor), descriptor
    """
    subprocess.run(["bash", "-c", f"exec '{sys.executable}' -c \"$0\" {closed}", code], cwd=ROOT, check=True)
    assert int((tmp_path / "found").read_text()) > 2


def test_a_run_goes_on_when_its_console_goes_away(images, tmp_path):
    os.mkfifo(tmp_path / "console")
    process = faults.start("pretrain", argv("pretrain", images, tmp_path, "--epochs", 4), tmp_path / "console")
    with (tmp_path / "console").open() as console_of_the_run:
        for line in console_of_the_run:
            if "epoch 1/" in line:
                break
    assert faults.exit_code(process) == 0
    assert set(log(tmp_path)) == set(range(4)) and (tmp_path / "checkpoint-3.pth").is_file()


def test_text_that_a_stream_lacks_is_escaped_and_errors_are_swallowed(tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = console.TolerantStream(file)
        print("ä", LATIN, file=stream)
        stream.flush()
    assert (tmp_path / "out").read_text() == "\\xe4 caf\\udce9\n"
    print("into a closed file", file=stream)
    stream.flush()
    stream.flush_or_abandon()
    print("nowhere", file=console.TolerantStream(None))


def test_an_error_that_all_ranks_raise_alike_is_printed_once_a_machine(monkeypatch, capsys):
    def full_disk():
        error = OSError(errno.ENOSPC, "No space left on device", "log.txt")
        error.on_every_rank = True  # as dist.run_on_rank0 marks it
        raise error

    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            errors.run(full_disk)
        assert end.value.code == 2 and capsys.readouterr().err.count("cannot write log.txt") == count

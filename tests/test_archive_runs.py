"""Runs on archives end as runs on the folders do, bit for bit, whether they were killed or not."""

import signal
import sys

import archives
import faults
import numpy as np
import pytest
from conftest import ROOT
from runs import EVERY_STEP, assert_same_end, job_argv, log, wait_for

import main_features
import main_predict
import main_reconstruct
from util import inference
from util.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import mean_std
import pixel_baseline


def words(*values):
    return [str(value) for value in values]


def start(job, data, folder, workers, world, *more):
    """Start a run, which saves after every update; return its processes."""
    argv = job_argv(data, folder, *EVERY_STEP, "--num_workers", workers, "--resume", "auto", *more, job=job)
    if world == 1:
        return [faults.start(job, argv, folder / "out-0")]
    return faults.start_ranks(job, argv, folder / "out", world=world)


def run(job, data, folder, workers, world):
    """Run a job to its end."""
    codes = [faults.exit_code(process) for process in start(job, data, folder, workers, world)]
    assert codes == [0] * world, (folder / "out-0").read_text()[-3000:]


def kill(job, data, folder, workers, world):
    """Kill a run in the middle of its second epoch."""
    processes = start(job, data, folder, workers, world)
    wait_for(folder / "out-0", r"epoch 1/\d+ \[")
    for process in processes:
        process.kill()
    assert [faults.exit_code(process) for process in processes] == [-signal.SIGKILL] * world


def assert_equal(folder, expected):
    """Assert that two runs ended alike, with the same log but for times."""
    assert_same_end(folder, expected)
    assert log(folder) == log(expected)


def test_runs_on_archives_are_runs_on_folders(images, undisturbed, tmp_path):
    """Two of the forms, one run killed; the slow tests kill a run of every form, alone and on two ranks."""
    cases = [("shards", "pretrain", 2, True), ("webdataset", "finetune", 0, False)]
    for form, job, workers, killed in cases:
        folder = tmp_path / form
        packed = archives.pack(images, folder / "packed", form)
        if killed:
            kill(job, packed, folder, workers, 1)
        run(job, packed, folder, workers, 1)
        assert_equal(folder, undisturbed / job)


def test_the_scripts_read_archives_as_folders(images, undisturbed, tmp_path, capsys):
    """The CSV, the features and the pictures are those of the folders but for the archives' own names."""
    packed = archives.pack(images, tmp_path / "packed", "one")
    classifier, autoencoder = (undisturbed / job / "checkpoint-last.pth" for job in ("finetune", "pretrain"))
    sides = {"folder": images / "val", "archive": packed / "val.tar"}
    for name, val in sides.items():
        out = tmp_path / name
        main_predict.main(words("--resume", classifier, "--images", val, "--output", out / "p.csv"))
        more = ["--neighbours", str(val).replace("val", "train")]
        main_features.main(words("--resume", autoencoder, "--data_path", val, "--output", out / "f.npz", *more))
        main_reconstruct.main(words("--resume", autoencoder, "--images", val, "--output", out / "r.png", "--num", 4))
        mean_std.main(words(val))
    said = (
        capsys.readouterr()
        .out.replace(str(tmp_path), "")
        .replace("/archive/", "/folder/")
        .replace("train.tar", "train")
    )
    lines = said.splitlines()
    assert len(lines) >= 10 and lines[: len(lines) // 2] == lines[len(lines) // 2 :]

    rows = {name: (tmp_path / name / "p.csv").read_text() for name in sides}
    assert f"{packed}/val.tar/val/bag/" in rows["archive"]
    assert rows["archive"].replace(f"{packed}/val.tar/val/", f"{images}/val/") == rows["folder"]
    features = {name: np.load(tmp_path / name / "f.npz") for name in sides}
    for entry in ("features", "files", "labels", "classes"):
        assert (features["archive"][entry] == features["folder"][entry]).all()
    assert (tmp_path / "archive/r.png").read_bytes() == (tmp_path / "folder/r.png").read_bytes()


def test_labels_of_features_are_the_archives_numbers(undisturbed, tmp_path):
    """As those of the jobs are: the names of classes may have any order."""
    members = {}
    for number in range(12):
        members |= archives.sample(f"{number:02d}", number)
    archives.write(tmp_path / "val/0.tar", members)
    checkpoint = undisturbed / "pretrain" / "checkpoint-last.pth"
    main_features.main(words("--resume", checkpoint, "--data_path", tmp_path / "val", "--output", tmp_path / "f.npz"))
    with np.load(tmp_path / "f.npz") as found:
        assert found["labels"].tolist() == list(range(12))
        assert found["classes"].tolist() == [f"class_{number}" for number in range(12)]


def test_the_pixel_baseline_reads_archives(images, tmp_path, capsys):
    pytest.importorskip("sklearn")
    for data in (images, archives.pack(images, tmp_path / "packed", "classes")):
        pixel_baseline.main(words("--data_path", data, "--iterations", 3))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_archives_beside_images_are_left_out_of_what_is_named(tmp_path, capsys):
    """A folder of downloads may hold images and archives; a folder of archives alone is read."""
    archives.write(tmp_path / "x/0.tar", {"a/1.png": b"", "a/2.txt": b""})
    assert [str(path) for path in inference.find_images([tmp_path / "x"])] == [f"{tmp_path}/x/0.tar/a/1.png"]
    assert "1 file of other kinds (.txt 1)" in capsys.readouterr().err
    (tmp_path / "x/2.png").touch()
    assert inference.find_images([tmp_path / "x"]) == [tmp_path / "x/2.png"]
    assert "1 file of other kinds (.tar 1)" in capsys.readouterr().err
    with pytest.raises(UserError, match="gunzip"):
        (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b123456")
        inference.find_images([tmp_path / "x.tar.gz"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "workers", "world"), [("pretrain", 0, 2), ("pretrain", 2, 1), ("finetune", 0, 1), ("finetune", 2, 2)]
)
def test_every_form_with_and_without_workers_on_one_and_two_ranks(job, workers, world, images, tmp_path):
    """Each is killed with SIGKILL in mid-epoch and resumed; a default test has a run that is not.

    Fine-tuning augments at random by default, and by the flags of the small runs mixes images.
    """
    (tmp_path / "folders").mkdir()
    run(job, images, tmp_path / "folders", workers, world)
    for form in archives.FORMS:
        packed = archives.pack(images, tmp_path / "packed" / form, form)
        folder = tmp_path / form
        folder.mkdir()
        kill(job, packed, folder, workers, world)
        run(job, packed, folder, workers, world)
        assert_equal(folder, tmp_path / "folders")

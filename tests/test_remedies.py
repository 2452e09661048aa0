"""Remedies that messages name, each followed to its end: the mistake is refused, what the message says then works."""

import shutil

import numpy as np
import pytest
from conftest import SAMPLES, link_images
from PIL import Image
from runs import job_argv

import main_finetune
import main_linprobe
import main_pretrain
from util.errors import UserError

MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "linprobe": main_linprobe.main}


@pytest.fixture
def data(tmp_path):
    """Folder of 20 training and 10 validation images of 10 classes, which a test may change."""
    for split, count in (("train", 2), ("val", 1)):
        link_images(SAMPLES / split, tmp_path / "data" / split, count=count)
    return tmp_path / "data"


@pytest.fixture
def run(data):
    """Function that runs a job for one epoch, without output unless the flags say otherwise."""

    def call(job, *flags):
        more = ["--num_workers", 0, "--epochs", 1, "--warmup_epochs", 0, "--monitor_freq", 0]
        more = more if job == "pretrain" else more[:-2]
        MAINS[job]([str(word) for word in job_argv(data, "", *more, *flags, job=job)])

    return call


# (job, flags that are wrong, message, flags that the message names).
FLAGS = [
    ("finetune", ["--nb_classes", 3], "pass --nb_classes 10", ["--nb_classes", 10]),
    ("pretrain", ["--batch_size", 81], "lower --batch_size to 20 or less", ["--batch_size", 20]),
    ("linprobe", ["--batch_size", 1], "needs at least 2", ["--batch_size", 2]),
    ("finetune", ["--batch_size", 5], "must be even", ["--batch_size", 6]),
    ("pretrain", ["--input_size", 30], "not a multiple of the patch size, 7", ["--input_size", 35]),
    ("pretrain", ["--in_chans", 4], "needs --mean and --std, 4 numbers", "--in_chans 4 --mean 0 0 0 0 --std 1 1 1 1"),
    ("pretrain", "--mean 0 0 0 --std 0 1 1", "that never changes has 1", "--mean 0 0 0 --std 1 1 1"),
    ("pretrain", ["--decoder_dim", 30], "multiple of 4 and of --decoder_heads 4", ["--decoder_dim", 32]),
    ("pretrain", ["--warmup_epochs", 1], "less than --epochs 1", ["--warmup_epochs", 0]),
    ("linprobe", ["--blr", 0.1, 0.2, "--lr", 1], "omit one of them", ["--blr", 0.1, 0.2]),
    ("pretrain", ["--resume", "auto"], "name the run's folder", None),
]


@pytest.mark.parametrize(("job", "wrong", "message", "right"), FLAGS, ids=lambda value: str(value)[:30])
def test_flags(job, wrong, message, right, run, tmp_path):
    with pytest.raises(UserError, match=message):
        run(job, *(wrong.split() if isinstance(wrong, str) else wrong))
    if right is None:
        right = ["--resume", "auto", "--output_dir", tmp_path / "out"]
    run(job, *(right.split() if isinstance(right, str) else right))


def test_a_class_without_validation_images(data, run, tmp_path, capsys):
    """A missing folder is refused; an empty one, which the message names, counts nothing, also in evaluation."""
    shutil.rmtree(data / "val" / "bag")
    with pytest.raises(UserError, match="only in .*train: bag.*in val those of classes.*may be empty"):
        run("finetune")
    (data / "val" / "bag").mkdir()
    run("finetune", "--output_dir", tmp_path / "out", "--confusion", tmp_path / "c.csv")
    assert "1 of 10 classes have no images" in capsys.readouterr().out
    assert [line for line in (tmp_path / "c.csv").read_text().splitlines() if line.startswith("bag,")] == [
        "bag," + "0," * 10  # no accuracy
    ]
    run("finetune", "--eval", "--resume", tmp_path / "out" / "checkpoint-0.pth", "--dist_eval")
    run("pretrain", "--monitor_freq", 1)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_evaluation_on_some_of_the_classes(named, count, data, run, tmp_path, capsys):
    """Named classes are judged among themselves, with the checkpoint's flags; without names all must have a folder."""
    run("finetune", "--output_dir", tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-0.pth"
    if not named:
        import torch

        stored = torch.load(checkpoint, weights_only=True)
        torch.save({"model": stored["model"]}, checkpoint)
    absent = sorted(folder.name for folder in (data / "val").iterdir())[count:]
    for name in absent:
        shutil.rmtree(data / "val" / name)
    if named:
        with pytest.raises(UserError, match="classes: 10 in the file, . here .--nb_classes"):
            run("finetune", "--eval", "--resume", checkpoint, "--nb_classes", count)
    else:
        with pytest.raises(UserError, match="so that there must be 10, some of which may be empty"):
            run("finetune", "--eval", "--resume", checkpoint)
        for name in absent:
            (data / "val" / name).mkdir()
    capsys.readouterr()
    run("finetune", "--eval", "--resume", checkpoint)
    out = capsys.readouterr().out
    assert ("names no classes: class k is taken to be the k-th folder" in out) != named and "* Acc@1" in out
    assert (f"{count} of the 10 classes are evaluated, and only their logits count" in out) == named


def test_an_empty_training_class(data, run):
    for file in (data / "train" / "bag").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no images in .*train/bag: add some, or remove the folder from every split"):
        run("finetune")
    for split in ("train", "val"):
        shutil.rmtree(data / split / "bag")
    run("finetune", "--nb_classes", 9)


def test_a_folder_in_which_a_run_is(run, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    run("pretrain", *out)
    with pytest.raises(UserError, match="--resume auto resumes it, --overwrite removes it, or choose another folder"):
        run("pretrain", *out)
    run("pretrain", *out, "--resume", "auto")
    run("pretrain", *out, "--overwrite")
    run("pretrain", "--output_dir", tmp_path / "other")


def test_another_schedule(run, tmp_path):
    out = ["--output_dir", tmp_path / "out", "--resume", "auto"]
    run("pretrain", *out)
    with pytest.raises(UserError, match="--resume_override"):
        run("pretrain", *out, "--epochs", 2)
    run("pretrain", *out, "--epochs", 2, "--resume_override")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--decoder_dim", 32], ["--decoder_dim", 64]),
        (["--decoder_depth", 1], ["--decoder_depth", 2]),
        (["--in_chans", 1], ["--in_chans", 3]),
        (["--patch_size", 4], ["--patch_size", 7]),
    ],
    ids=lambda value: value[0],
)
def test_the_flag_that_a_misfit_names(flags, named, run, tmp_path):
    run("pretrain", "--output_dir", tmp_path / "out")
    source = ["--init", tmp_path / "out" / "checkpoint-0.pth"]
    with pytest.raises(UserError, match=rf"{named[1]} in the file, {flags[1]} here \({flags[0]}\)"):
        run("pretrain", *source, *flags)
    run("pretrain", *source, *named)


def test_a_checkpoint_of_another_kind(run, tmp_path):
    run("pretrain", "--output_dir", tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-0.pth"
    with pytest.raises(UserError, match="train one first, with --finetune in main_finetune.py"):
        run("finetune", "--eval", "--resume", checkpoint)
    run("finetune", "--finetune", checkpoint)


def test_too_many_unreadable_images(data, run):
    """A single one never stops the run, unless none is allowed."""
    first, second = list((data / "train" / "bag").iterdir())[:2]
    for file in (first, second):
        file.unlink()
        file.write_bytes(b"")
    with pytest.raises(UserError, match="--max_bad_images 0.01: fix or remove them, or raise the limit"):
        run("pretrain")
    with pytest.raises(UserError, match="2 of 20 images .* --max_bad_images 0.06"):
        run("pretrain", "--max_bad_images", 0.06)
    run("pretrain", "--max_bad_images", 0.1)
    first.unlink()
    run("pretrain")
    with pytest.raises(UserError, match="1 of .* images .* cannot be read"):
        run("pretrain", "--max_bad_images", 0)


def test_a_large_image(data, run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 60)).save(data / "val" / "bag" / "large.png")
    with pytest.raises(UserError, match=r"--max_megapixels (\S+)") as refused:
        run("finetune")
    number = str(refused.value).split("--max_megapixels ")[1].split()[0]
    run("finetune", "--max_megapixels", number)


def test_a_monitor_without_readable_images(data, run):
    for file in (data / "val").glob("*/*"):
        file.unlink()
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match="turn monitoring off with --monitor_freq 0"):
        run("pretrain", "--monitor_freq", 1)
    run("pretrain", "--monitor_freq", 0)


def test_other_channels_than_the_files(data, run):
    for split in ("train", "val"):
        for file in (data / split).glob("*/*"):
            file.unlink()
            np.save(file.with_suffix(".npy"), np.zeros((28, 28, 5), np.uint8))
    with pytest.raises(UserError, match="change --in_chans"):
        run("pretrain")
    run("pretrain", "--in_chans", 5, "--mean", *"00000", "--std", *"11111")

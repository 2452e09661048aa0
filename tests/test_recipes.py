"""Datasets, recipes and results: data are prepared completely or not at all, recipes run, tables match the logs."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from recipes import ablations
from scripts import pixel_baseline, prepare_data, results
from util.errors import UserError


def write_idx(path, values):
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture
def fashion_mnist_files(tmp_path):
    """Folder with stand-ins for Fashion-MNIST's four files, with 3 images of each class."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "t10k"):
        labels = np.tile(np.arange(10, dtype=np.uint8), 3)
        write_idx(source / f"{name}-labels-idx1-ubyte.gz", labels)
        write_idx(
            source / f"{name}-images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
        )
    return source


def test_fashion_mnist_becomes_folders_once(fashion_mnist_files, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare_data.COUNTS, "fashion_mnist", (30, 30))
    words = ["fashion_mnist", "--source", str(fashion_mnist_files), "--output", str(tmp_path / "data")]
    prepare_data.main(words)
    assert (tmp_path / "data" / "train" / "sandal" / "00015.png").is_file()
    first = (tmp_path / "data" / "train").stat().st_ino
    prepare_data.main(words)
    assert (tmp_path / "data" / "train").stat().st_ino == first, "written again"
    (tmp_path / "data" / "val" / "bag" / "00008.png").unlink()
    prepare_data.main(words)
    assert (tmp_path / "data" / "val" / "bag" / "00008.png").is_file()
    prepare_data.main([*words[:-1], str(tmp_path / "cut"), "--per_class", "2"])
    assert len(list((tmp_path / "cut").glob("train/*/*.png"))) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"source", "data", "cut"}, "something was left behind"


def test_the_output_may_be_a_disk_of_its_own_and_is_no_file(fashion_mnist_files, tmp_path, monkeypatch):
    """Everything is written inside an output that is there; a folder beside it may be on another file system."""
    monkeypatch.setitem(prepare_data.COUNTS, "fashion_mnist", (30, 30))
    (tmp_path / "data").mkdir()
    rename, made = Path.rename, []

    def record(self, target):
        made.append((self, target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", record)
    words = ["fashion_mnist", "--source", str(fashion_mnist_files), "--output"]
    prepare_data.main([*words, str(tmp_path / "data")])
    assert made and all(path.is_relative_to(tmp_path / "data") for pair in made for path in pair)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"train", "val"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: name a folder"):
        prepare_data.main([*words, str(tmp_path / "file")])


def test_damaged_downloads_and_silent_errors_are_messages(fashion_mnist_files, tmp_path, monkeypatch):
    file = fashion_mnist_files / "t10k-images-idx3-ubyte.gz"
    data = bytearray(file.read_bytes())
    data[60:90] = bytes(30)
    file.write_bytes(data)
    with pytest.raises(UserError, match="cannot read .*t10k-images"):
        prepare_data.main(["fashion_mnist", "--source", str(fashion_mnist_files), "--output", str(tmp_path / "data")])

    def times_out(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(prepare_data.datasets, "CIFAR10", times_out)
    with pytest.raises(UserError, match="cannot download cifar10: TimeoutError. Give --source"):
        prepare_data.main(["cifar10", "--output", str(tmp_path / "data")])


@pytest.mark.parametrize(
    ("images", "labels"), [((30, 28, 28), (29,)), ((30, 28, 27), (30,)), ((30, 784), (30,)), ((30, 28, 28), (30, 1))]
)
def test_files_of_another_dataset_are_refused(images, labels, fashion_mnist_files, tmp_path):
    write_idx(fashion_mnist_files / "t10k-images-idx3-ubyte.gz", np.zeros(images, np.uint8))
    write_idx(fashion_mnist_files / "t10k-labels-idx1-ubyte.gz", np.zeros(labels, np.uint8))
    words = ["fashion_mnist", "--source", str(fashion_mnist_files), "--output", str(tmp_path / "data")]
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz of shape \[30, .* are not Fashion-MNIST's"):
        prepare_data.main(words)
    assert not (tmp_path / "data").exists()


def test_labels_of_another_dataset_are_refused(fashion_mnist_files, tmp_path):
    """EMNIST's letters have 26 classes."""
    write_idx(fashion_mnist_files / "train-labels-idx1-ubyte.gz", np.arange(30, dtype=np.uint8))
    with pytest.raises(UserError, match="with a label from 0 to 9 each"):
        prepare_data.main(["fashion_mnist", "--source", str(fashion_mnist_files), "--output", str(tmp_path / "data")])


def test_the_samples_are_what_the_script_makes(tmp_path):
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    prepare_data.main(["fashion_mnist", "--source", str(source), "--output", str(tmp_path / "s"), "--per_class", "200"])
    for file in (ROOT / "samples" / "fashion_mnist").glob("*/*/*.png"):
        other = tmp_path / "s" / file.relative_to(ROOT / "samples" / "fashion_mnist")
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(other)))


def test_an_archive_of_folders_is_taken_and_a_wrong_one_told(images, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare_data.COUNTS, "cifar10", (80, 30))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz", dereference=True) as tar:
        tar.add(images, "whatever")
    prepare_data.main(["cifar10", "--source", str(tmp_path / "c.tar.gz"), "--output", str(tmp_path / "data")])
    assert prepare_data.count_images(tmp_path / "data") == (80, 30)
    monkeypatch.setitem(prepare_data.COUNTS, "cifar10", (81, 30))
    with pytest.raises(UserError, match="c.tar.gz holds 80 training and 30 validation images instead of 81 and 30"):
        prepare_data.main(["cifar10", "--source", str(tmp_path / "c.tar.gz"), "--output", str(tmp_path / "data")])
    assert prepare_data.count_images(tmp_path / "data") == (80, 30)  # unchanged
    monkeypatch.setitem(prepare_data.COUNTS, "cifar10", (80, 30))
    own = tmp_path / "mine" / "train" / "x" / "own.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"precious")
    with pytest.raises(UserError, match="mine/train/x does not belong to the dataset"):
        prepare_data.main(["cifar10", "--source", str(tmp_path / "c.tar.gz"), "--output", str(tmp_path / "mine")])
    assert own.read_bytes() == b"precious"
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "c.tar.gz").read_bytes()[:20_000])
    for name in ("broken.tar", "cut.tar.gz"):
        with pytest.raises(UserError, match=f"cannot unpack .*{name}"):
            prepare_data.main(["cifar10", "--source", str(tmp_path / name), "--output", str(tmp_path / "other")])


def test_raw_pixels_are_a_baseline(images, tmp_path, capsys):
    pixel_baseline.main(["--data_path", str(images), "--iterations", "50"])
    found = json.loads(capsys.readouterr().out)
    assert 20 < found["test_acc1"] < 95 and 20 < found["test_knn"] < 95 and found["images"] == 80
    (tmp_path / "train").mkdir()
    for folder in (images / "train").iterdir():
        (tmp_path / "train" / folder.name).symlink_to(folder)
    (tmp_path / "train" / "aaa").symlink_to(images / "train" / "bag")
    (tmp_path / "val").symlink_to(images / "val")
    with pytest.raises(UserError, match="classes of train and val differ"):
        pixel_baseline.main(["--data_path", str(tmp_path), "--iterations", "5"])


@pytest.mark.parametrize("kind", ["sizes", "one class", "iterations"])
def test_what_raw_pixels_cannot_be_compared_by(kind, tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b") if kind != "one class" else ("a",):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                size = (28, 14) if kind == "sizes" and number % 2 else (14, 28)
                Image.new("L", size, 9 * number).save(tmp_path / split / name / f"{number}.png")
    message = {
        "sizes": "of different sizes",
        "one class": "has images of one class",
        "iterations": "--iterations 0 must be",
    }
    with pytest.raises(UserError, match=message[kind]):
        words = ["--data_path", str(tmp_path), "--iterations", "0" if kind == "iterations" else "5"]
        pixel_baseline.main(words)


def test_raw_pixels_of_float_files_count_as_those_of_pictures(images, tmp_path, capsys):
    """Half of the files become arrays from 0 to 1, which 8 bits are scaled to."""
    shutil.copytree(images, tmp_path / "mixed")
    for file in sorted((tmp_path / "mixed").rglob("*.png"))[::2]:
        np.save(file.with_suffix(".npy"), np.asarray(Image.open(file).convert("RGB")).astype(np.float32) / 255)
        file.unlink()
    found = []
    for folder in (images, tmp_path / "mixed"):
        pixel_baseline.main(["--data_path", str(folder), "--iterations", "20"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["test_knn"] == found[1]["test_knn"]


def test_one_class_with_images_beside_an_empty_one_is_no_baseline(images, tmp_path):
    shutil.copytree(images / "val" / "bag", tmp_path / "train" / "bag")
    (tmp_path / "train" / "coat").mkdir()
    shutil.copytree(images / "val" / "bag", tmp_path / "val" / "bag")
    shutil.copytree(images / "val" / "coat", tmp_path / "val" / "coat")
    with pytest.raises(UserError, match="has images of one class"):
        pixel_baseline.main(["--data_path", str(tmp_path), "--iterations", "5"])


def test_an_ablation_whose_checkpoint_is_gone_is_pretrained_again_if_later_steps_need_it(tmp_path, monkeypatch):
    done = []

    def train(step, command, output, log):
        done.append(step.rpartition(" ")[2])
        write_log(log, 60.0)

    monkeypatch.setattr(ablations, "_train", train)
    folders = tmp_path / "output", tmp_path / "results"
    ablations.chain("x", "", 0, *folders, partial=False)
    ablations.chain("x", "", 0, *folders, partial=False)  # all logs are there
    assert done == ["pretrain", "probe", "finetune"]
    (tmp_path / "results/x/seed0/finetune.jsonl").unlink()
    ablations.chain("x", "", 0, *folders, partial=False)
    assert done[3:] == ["pretrain", "finetune"]


def write_log(path, accuracy):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"epoch": e, "test_acc1": accuracy - 1 + e}) + "\n" for e in range(2)))


def test_tables_say_last_epochs_with_mean_and_deviation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PICTURES", tmp_path)
    for seed, accuracy in enumerate((80.0, 82.0, 84.0)):
        write_log(tmp_path / "results" / "cifar10" / "finetune" / f"seed{seed}.jsonl", accuracy)
        write_log(tmp_path / "results" / "ablations" / "default" / f"seed{seed}" / "probe.jsonl", accuracy - 10)
    write_log(tmp_path / "results" / "cifar10" / "scratch" / "seed0.jsonl", 60.0)
    pixels = tmp_path / "results" / "cifar10" / "pixels" / "seed0.jsonl"
    pixels.parent.mkdir()
    pixels.write_text('{"test_knn": 40.5}\n')
    results.datasets()
    results.ablations()
    said = capsys.readouterr().out
    assert "| fine-tuned | 82.00 ± 2.00 | 3 |" in said and "| from scratch | 60.00 | 1 |" in said
    assert "| cifar10 | all | 82.0 ± 2.0 | 60.0 | +22.0 |" in said and "10 %" not in said
    assert "nearest neighbours in raw pixels | 40.50 | 1 |" in said and "logistic" not in said
    assert "| n = 3 | 0.25 |" in said
    assert "| probe | not measured | not measured | not measured | 72.0 ± 2.0 | not measured |" in said
    names = {"cifar10", "mask_ratio", "decoder_depth", "targets", "sampling", "length", "partial"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names


def test_the_published_tables_are_those_of_the_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "PICTURES", tmp_path)
    results.datasets()
    results.comparisons()
    results.ablations()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    pages = [ROOT / "RESULTS.md", ROOT / "docs" / "ablations.md"]
    assert set(rows) <= {line for page in pages for line in page.read_text().splitlines()}


def test_a_log_without_lines_is_a_message(tmp_path):
    (tmp_path / "seed0.jsonl").write_text("")
    with pytest.raises(UserError, match="seed0.jsonl holds no figures"):
        results.summarise([tmp_path / "seed0.jsonl"])


def test_after_a_failed_run_no_other_variant_is_begun(tmp_path, monkeypatch):
    begun = []

    def failing(variant, *_, **__):
        begun.append(variant)
        raise SystemExit(f"{variant} failed")

    monkeypatch.setattr(ablations, "chain", failing)
    words = ["ablations.py", "--jobs", "1", "--results", str(tmp_path), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="default failed"):
        ablations.main()
    assert len(begun) < 5, "of 45"
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--jobs", "0"])
    with pytest.raises(UserError, match="--jobs 0 must be at least 1"):
        ablations.main()


def test_every_ablation_is_plotted_and_every_plot_run():
    run = {name for variants in ablations.ABLATIONS.values() for name in variants} | {"default"}
    plotted = {variant for _, _, marks in results.PLOTS.values() for variant, _ in marks}
    assert run == plotted


@pytest.fixture
def recipe(images, tmp_path):
    """Function that runs a recipe on 80 images, in folders with a space in their names; it returns the output."""
    (tmp_path / "my data").symlink_to(images)
    env = {
        **os.environ,
        "DATA": str(tmp_path / "my data"),
        "OUT": str(tmp_path / "my out"),
        "RESULTS": str(tmp_path / "results"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(name, *flags, **more):
        command = [ROOT / "recipes" / f"{name}.sh", *flags]
        done = subprocess.run(command, env=env | more, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_fashion_mnists_recipes_run_and_go_on(recipe, tmp_path):
    """A recipe that is run again trains nothing, since its run has finished."""
    for row in ("pretrain", "finetune", "scratch", "probe", "attentive", "knn", "pixels"):
        recipe(f"fashion_mnist/{row}", *([] if row in ("knn", "pixels") else ["--batch_size", "16"]))
        last = json.loads((tmp_path / "results" / row / "seed0.jsonl").read_text().splitlines()[-1])
        assert 0 <= last.get("test_acc1", 50) <= 100
    before = (tmp_path / "results" / "finetune" / "seed0.jsonl").read_text()
    assert "nothing left to train: all" in recipe("fashion_mnist/finetune", "--batch_size", "16")
    assert (tmp_path / "results" / "finetune" / "seed0.jsonl").read_text() == before


@pytest.mark.slow
def test_the_recipes_of_the_small_encoder_on_cifar10_run(recipe, tmp_path):
    """Every row starts from the weights that pretrain.sh leaves, or from those that ENCODER names."""
    small = ["--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0"]
    recipe("cifar10_small/pretrain", *small, "--save_freq", "1")
    encoder = str(tmp_path / "my out" / "pretrain-seed0" / "checkpoint-0.pth")
    recipe("cifar10_small/all", *small, ENCODER=encoder, JOBS="2", OMP_NUM_THREADS="1")
    logs = sorted(str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*.jsonl"))
    seeds = dict.fromkeys(("finetune", "knn", "pixels", "pretrain", "scratch"), 1)
    seeds |= dict.fromkeys(("attentive", "finetune_10pct", "probe_cls", "probe_pooled", "scratch_10pct"), 3)
    assert logs == sorted(f"{row}/seed{number}.jsonl" for row, count in seeds.items() for number in range(count))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10/pretrain", "cifar10/finetune", "cifar10/scratch", "imagenette/pretrain"])
def test_recipes_for_a_gpu_have_flags_that_are_right(name, recipe, tmp_path):
    """Their commands run with one epoch of small images: of 16 patches by 2 pixels, or of 4 by 16."""
    side = "8" if name.startswith("cifar10") else "32"
    small = ["--device", "cpu", "--batch_size", "16", "--epochs", "1", "--warmup_epochs", "0", "--input_size", side]
    recipe(name, *small, *(["--finetune", ""] if name.endswith("finetune") else []))
    assert len(list((tmp_path / "results").rglob("seed0.jsonl"))) == 1

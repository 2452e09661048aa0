"""What the scripts write: whole or not at all, without the inputs that are bad, and readable by others."""

import csv
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import archives
import faults
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from runs import job_argv, wait_for
from torch.utils.tensorboard import SummaryWriter

import main_export
import main_features
import main_finetune
import main_linprobe
import main_predict
import main_pretrain
import main_reconstruct
import models_load
from util import disk, errors
from util.checkpoint.comparison import comparable
from util.data import loaders
from util.disk import remove_unfinished, write_whole
from util.errors import Incomplete, UserError


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Folder with checkpoints of a pre-training and a fine-tuning."""
    root = tmp_path_factory.mktemp("trained")
    for job, main in (("pretrain", main_pretrain.main), ("finetune", main_finetune.main)):
        more = ["--num_workers", 0, "--epochs", 1, "--warmup_epochs", 0]
        main([str(word) for word in job_argv(images, root / job, *more, job=job)])
    return root


@pytest.fixture
def mixed(images, tmp_path):
    """Folder of 30 images, of which three are no images: an empty one, a truncated one, a web page."""
    shutil.copytree(images / "val", tmp_path / "mixed")
    files = sorted((tmp_path / "mixed").rglob("*.png"))
    for file, content in zip(files[::13], (b"", files[13].read_bytes()[:70], b"<html>404</html>"), strict=True):
        file.write_bytes(content)
    return tmp_path / "mixed"


def arguments(script, trained, source, output):
    job, flag = {
        main_predict: ("finetune", "--images"),
        main_features: ("finetune", "--data_path"),
        main_reconstruct: ("pretrain", "--images"),
    }[script]
    words = ["--resume", trained / job / "checkpoint-0.pth", flag, source, "--output", output, "--batch_size", 4]
    return [str(word) for word in words] + (["--num", "99"] if script is main_reconstruct else [])


SHORT = ["--num_workers", 0, "--monitor_freq", 0, "--epochs", 1, "--warmup_epochs", 0]
SCRIPTS = [(main_predict, "p.csv"), (main_features, "f.npz"), (main_reconstruct, "g.png")]


def test_an_output_through_a_folder_that_is_not_there_is_seen_where_it_lies(trained, images, tmp_path, refusal):
    """Until NEW exists, NEW/../RUN does not either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("{}")
    argv = job_argv(images, tmp_path / "new" / ".." / "run", *SHORT)
    assert "holds another run (log.txt)" in refusal(lambda: main_pretrain.main([str(word) for word in argv]))

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("important")
    words = ["--resume", str(trained / "finetune" / "checkpoint-0.pth"), "--to", "hf"]
    refusal(lambda: main_export.main([*words, "--output", f"{tmp_path}/new/../other"]))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    (tmp_path / "other" / "config.json").write_text("{}")
    argv = [*words[:2], "--to", "timm", "--output", f"{tmp_path}/new/../other"]
    assert "is not of an earlier export" in refusal(lambda: main_export.main(argv))

    picture = Path(shutil.copy(next(images.rglob("*.png")), tmp_path / "picture.png"))
    argv = arguments(main_reconstruct, trained, picture, tmp_path / "new" / ".." / "picture.png")
    assert "is one of the inputs" in refusal(lambda: main_reconstruct.main(argv))


def test_a_failed_export_removes_nothing_of_others(tmp_path):
    with pytest.raises(RuntimeError), main_export.replace_export(tmp_path / "new"):
        (tmp_path / "new" / "other.txt").write_text("of another program")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other.txt"]
    with pytest.raises(RuntimeError), main_export.replace_export(tmp_path / "newer") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError
    assert not (tmp_path / "newer").exists()


def test_no_table_replaces_a_checkpoint_or_a_log(trained, images, tmp_path, refusal):
    for name in ("model.safetensors", "mine.pth", "log.txt"):
        (tmp_path / name).write_text("precious")
        argv = arguments(main_predict, trained, images / "val", tmp_path / name)
        assert "is a checkpoint or a log, and would be replaced" in refusal(lambda argv=argv: main_predict.main(argv))
        assert (tmp_path / name).read_text() == "precious"


def test_a_run_does_not_write_among_the_images(images, tmp_path, refusal):
    argv = job_argv(images, images / "train" / "run", *SHORT)
    said = refusal(lambda: main_pretrain.main([str(word) for word in argv]))
    assert "lies among the images" in said and not (images / "train" / "run").exists()


@pytest.mark.parametrize("name", ["x" * 300, "loop/run"])
def test_names_that_no_folder_can_have_end_in_a_message(name, images, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    argv = job_argv(images, tmp_path / name, *SHORT)
    with pytest.raises(SystemExit) as end:
        errors.run(lambda: main_pretrain.main([str(word) for word in argv]))
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("script", "name"), SCRIPTS)
def test_an_input_is_not_replaced(script, name, trained, images, tmp_path, refusal):
    picture = Path(shutil.copy(next(images.rglob("*.png")), tmp_path / "picture.png"))
    for file in (picture, Path(arguments(script, trained, picture, "x")[1])):
        before = file.read_bytes()
        said = refusal(lambda file=file: script.main(arguments(script, trained, picture, file)))
        assert f"{file} is one of the inputs, and would be replaced" in said
        assert file.read_bytes() == before


@pytest.mark.parametrize("separate", [True, False])
def test_an_image_in_the_folder_is_not_replaced(separate, trained, images, tmp_path, refusal):
    shutil.copytree(images / "val" / "bag", tmp_path / "photos")
    first = sorted((tmp_path / "photos").iterdir())[0]
    panel = Path(shutil.copy(first, tmp_path / "photos" / f"{first.stem}-with_visible.png"))
    before = panel.read_bytes()
    words = arguments(main_reconstruct, trained, tmp_path / "photos", panel)
    if separate:
        words = arguments(main_reconstruct, trained, first, panel.parent) + [
            "--separate",
            "--images",
            str(first),
            str(panel),
        ]
    said = refusal(lambda: main_reconstruct.main(words))
    assert f"{panel} is one of the images, and would be replaced: choose another --output" in said
    assert panel.read_bytes() == before and len(list((tmp_path / "photos").iterdir())) == 4


def test_a_table_replaces_no_image_of_the_folder(trained, images, tmp_path, refusal):
    shutil.copytree(images / "val" / "bag", tmp_path / "photos")
    image = sorted((tmp_path / "photos").iterdir())[0]
    said = refusal(lambda: main_predict.main(arguments(main_predict, trained, tmp_path / "photos", image)))
    assert f"{image} is one of the images, and would be replaced" in said and Image.open(image).size == (28, 28)


def test_a_table_replaces_no_archive_of_the_images(trained, images, tmp_path, refusal):
    archive = archives.write(tmp_path / "photos.tar", {"bag/1.png": archives.PNG})
    said = refusal(lambda: main_predict.main(arguments(main_predict, trained, archive.parent, archive)))
    assert f"{archive} is one of the images, and would be replaced" in said


def test_an_image_that_is_named_twice_has_its_panels(trained, images, tmp_path):
    first, second = sorted((images / "val" / "bag").iterdir())[:2]
    words = arguments(main_reconstruct, trained, first, tmp_path / "out")
    main_reconstruct.main([*words, "--separate", "--images", *map(str, (first, first, second))])
    assert len(list((tmp_path / "out").iterdir())) == 8


@pytest.mark.parametrize(("script", "name"), SCRIPTS)
def test_an_output_that_is_not_finite_is_named(script, name, trained, images, tmp_path, capsys):
    shutil.copytree(images / "val" / "bag", tmp_path / "photos" / "bag")
    np.save(tmp_path / "photos" / "bag" / "huge.npy", np.full((28, 28, 3), 1e30))
    with pytest.raises(Incomplete, match="the model's output for 1 of 4 images is not finite"):
        script.main(arguments(script, trained, tmp_path / "photos", tmp_path / name))
    assert "the model's output is not finite: " + str(tmp_path / "photos/bag/huge.npy") in capsys.readouterr().err
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize(("script", "name"), SCRIPTS)
def test_bad_images_are_named_and_the_others_are_done(script, name, trained, mixed, tmp_path, capsys):
    argv = arguments(script, trained, mixed, tmp_path / name)
    with pytest.raises(SystemExit) as end:
        errors.run(lambda: script.main(argv))
    said = capsys.readouterr().err
    assert end.value.code == 1 and "error: 3 of 30 images cannot be read (named above)" in said, said
    assert said.count("unreadable image, left out: ") == 3
    if name == "p.csv":
        with (tmp_path / name).open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 27
    elif name == "f.npz":
        stored = np.load(tmp_path / name)
        assert len(stored["features"]) == len(stored["files"]) == len(stored["labels"]) == 27
        assert all(
            stored["classes"][label] == file.split("/")[0]
            for label, file in zip(stored["labels"], stored["files"], strict=True)
        )


def test_loader_processes_change_no_feature_and_no_order(trained, mixed, tmp_path, capsys, monkeypatch):
    stored, said, started, data_loader = [], [], [], loaders.data_loader

    def recorded(files, loading, *more, **options):
        started.append(loading.num_workers)
        return data_loader(files, loading, *more, **options)

    monkeypatch.setattr(loaders, "data_loader", recorded)
    for workers in ("0", "2"):
        argv = arguments(main_features, trained, mixed, tmp_path / f"{workers}.npz")
        with pytest.raises(Incomplete):
            main_features.main([*argv, "--num_workers", workers])
        stored.append(np.load(tmp_path / f"{workers}.npz"))
        said.append(capsys.readouterr().err)
    assert started == [0, 2] and len(set(stored[0]["files"])) == 27
    assert said[0] == said[1] and said[0].count("unreadable image, left out: ") == 3
    for name in ("features", "files", "labels", "classes"):
        assert np.array_equal(stored[0][name], stored[1][name]), name


@pytest.mark.parametrize(("script", "name"), SCRIPTS)
def test_a_run_without_any_readable_image_leaves_the_file_before(script, name, trained, tmp_path, refusal):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"")
    (tmp_path / name).write_text("before")
    said = refusal(lambda: script.main(arguments(script, trained, tmp_path / "bad", tmp_path / name)))
    assert "none of 1 images can be read" in said
    assert (tmp_path / name).read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["bad", name]), "an unfinished file was left"


def test_a_picture_of_many_images_is_made_by_the_batch(trained, images, tmp_path, monkeypatch):
    """Whatever the batch size, the picture is the same, and no forward pass gets more images."""
    import models_mae

    seen, forward = [], models_mae.MaskedAutoencoderViT.forward

    def counting(self, imgs, *args, **kwargs):
        seen.append(len(imgs))
        return forward(self, imgs, *args, **kwargs)

    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "forward", counting)
    main_reconstruct.main(arguments(main_reconstruct, trained, images / "val", tmp_path / "four.png"))
    assert max(seen) == 4 and sum(seen) == 30
    more = [*arguments(main_reconstruct, trained, images / "val", tmp_path / "all.png"), "--batch_size", "64"]
    main_reconstruct.main(more)
    four, together = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("four.png", "all.png"))
    assert np.abs(four - together).max() <= 1


# Writing.


def test_two_files_are_written_side_by_side_whatever_the_numbers_of_the_processes(tmp_path):
    """Two containers share a folder, and their processes a number."""
    with write_whole(tmp_path / "a.csv") as one, write_whole(tmp_path / "b.csv") as other:
        one.write_text("a")
        other.write_text("b")
    assert (tmp_path / "a.csv").read_text() == "a" and (tmp_path / "b.csv").read_text() == "b"


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    stale, fresh, folder = (tmp_path / f".unfinished-{name}" for name in ("stale.csv", "fresh.csv", "export"))
    folder.mkdir()
    for path in (stale, fresh, folder / "model.safetensors"):
        path.touch()
    for path in (stale, folder):
        os.utime(path, (0, 0))
    remove_unfinished(tmp_path, idle=3600)
    assert list(tmp_path.iterdir()) == [fresh]
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ZeroDivisionError), write_whole(tmp_path / "link") as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "real").read_text() == "before"
    with write_whole(tmp_path / "link") as unfinished:
        unfinished.write_text("after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    with write_whole(tmp_path / "new" / "deep" / "file.csv") as unfinished:
        assert unfinished.suffix == ".csv"
        unfinished.write_text("x")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with write_whole(tmp_path / "pipe") as unfinished:
        unfinished.write_text("through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "new", "pipe"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_export_leaves_the_one_before(number, trained, tmp_path, monkeypatch, refusal):
    checkpoint = str(trained / "pretrain" / "checkpoint-0.pth")
    main_export.main(["--resume", checkpoint, "--to", "timm", "--output", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(path, value):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(main_export, "write_json", failing)
    said = refusal(lambda: main_export.main(["--resume", checkpoint, "--to", "hf", "--output", str(tmp_path)]))
    assert f"cannot write {tmp_path}: {os.strerror(number)}" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_leaves_nothing_of_another_format(trained, tmp_path):
    checkpoint = str(trained / "pretrain" / "checkpoint-0.pth")
    for to in ("hf", "encoder", "timm"):
        main_export.main(["--resume", checkpoint, "--to", to, "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_what_the_umask_lets_them(umask, trained, tmp_path):
    before = os.umask(umask)
    try:
        checkpoint = str(trained / "pretrain" / "checkpoint-0.pth")
        main_export.main(["--resume", checkpoint, "--to", "encoder", "--output", str(tmp_path / "out")])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize("name", ["a|b", "two\nlines", "back\\slash|"])
def test_the_cards_table_holds_any_name(name, trained, images, tmp_path):
    (tmp_path / name).symlink_to(images)
    main_pretrain.main([str(word) for word in job_argv(tmp_path / name, tmp_path / "out", *SHORT)])
    checkpoint = str(tmp_path / "out" / "checkpoint-0.pth")
    main_export.main(["--resume", checkpoint, "--to", "timm", "--output", str(tmp_path / "export")])
    lines = (tmp_path / "export" / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert all(len(line.replace("\\\\", "").replace("\\|", "").split("|")) == 4 for line in rows)
    recipe = next(line for line in lines if line.startswith("Recipe"))
    assert "--crop_scale 0.2 1.0 " in recipe


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        (main_pretrain, "--norm_pix_loss --decoder_depth 2 --exif --input_size 32 64 --clip_grad 2"),
        (main_finetune, "--nb_classes 3 --cls_token --model_ema --model_ema_decay 0.9 --cutmix_minmax 0.2 0.5"),
        (main_finetune, "--nb_classes 3 --crop_pct 0.9 --color_jitter 0.3"),
        (main_linprobe, "--nb_classes 3 --global_pool --blr 0.1 0.2 --class_weights balanced"),
    ],
)
def test_the_cards_recipe_is_the_command_line_again(job, flags):
    trained = vars(job.get_args(flags.split()))
    words = main_export.recipe(trained).split()
    again = vars(job.get_args([*words, *(["--nb_classes", "3"] if "nb_classes" in trained else [])]))
    assert all(comparable(again[name]) == comparable(value) for name, value in trained.items()), again
    assert words.count("--model_ema_decay") == flags.count("--model_ema_decay")


def test_the_card_of_a_sweep_shows_no_sum_over_its_heads():
    stats = {"train_loss": 7.0, "test_acc1": 50.0, "test_acc1_blr0.1": 40.0}
    assert set(main_export.exported_figures({"stats": stats, "args": {"blr": [0.1, 0.2]}}, ema=False)) == {"test_acc1"}
    assert "train_loss" in main_export.exported_figures({"stats": stats, "args": {"blr": 0.1}}, ema=False)


def test_overwrite_removes_the_events_in_log_dir_too(images, tmp_path):
    for more in ([], ["--overwrite"]):
        argv = job_argv(images, tmp_path / "a", "--log_dir", tmp_path / "b", *SHORT)
        main_pretrain.main([str(word) for word in [*argv, *more]])
    assert len(list((tmp_path / "b").glob("events.out.tfevents.*"))) == 1


def test_overwrite_leaves_other_runs_events_in_a_common_log_dir(images, tmp_path):
    for run, more in (("a", []), ("b", []), ("a", ["--overwrite"])):
        argv = job_argv(images, tmp_path / run, "--log_dir", tmp_path / "logs", *SHORT)
        main_pretrain.main([str(word) for word in [*argv, *more]])
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 2


def test_log_txt_stays_json_when_figures_are_not_finite(images, tmp_path):
    more = [*SHORT, "--lr", "1e30", "--max_bad_steps", 10**6, "--monitor_freq", 1, "--epochs", 2]
    main_pretrain.main([str(word) for word in job_argv(images, tmp_path, *more)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 2 and lines[1]["test_loss"] is None
    argv = job_argv(images, tmp_path, *more, "--epochs", 3, "--resume", "auto", "--resume_override")
    main_pretrain.main([str(word) for word in argv])


def test_splits_are_not_taken_for_classes(trained, images, tmp_path):
    with pytest.raises(UserError, match=rf"{images} holds splits \(train, val\): name one of them, {images}/train"):
        main_features.main(arguments(main_features, trained, images, tmp_path / "f.npz"))


def test_labels_that_a_stray_image_prevents_are_said(trained, images, tmp_path, capsys):
    shutil.copytree(images / "val", tmp_path / "val")
    shutil.copy(next((tmp_path / "val" / "bag").iterdir()), tmp_path / "val" / "stray.png")
    main_features.main(arguments(main_features, trained, tmp_path / "val", tmp_path / "f.npz"))
    assert "no labels, since there are images beside the class folders: stray.png" in capsys.readouterr().out


def test_an_output_folder_that_goes_comes_back(images, tmp_path):
    """What was trained is saved, whatever else could not be written."""
    argv = job_argv(images, tmp_path / "out", "--num_workers", 0, "--monitor_freq", 0, "--save_freq", 100)
    process = faults.start("pretrain", argv, tmp_path / "said", ("slow_steps", 0.1))
    wait_for(tmp_path / "said", r"epoch 1/\d+ \[1/")
    # Renamed first, so that the run can't write into the folder while it is removed.
    shutil.rmtree((tmp_path / "out").rename(tmp_path / "gone"))
    assert faults.exit_code(process) in (0, 2)
    said = (tmp_path / "said").read_text()
    # A thread of TensorBoard's prints a traceback of its own.
    assert (tmp_path / "out" / "checkpoint-last.pth").is_file() and 'main_pretrain.py", line' not in said


def test_tensorboard_that_fails_ends_nothing(images, tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "add_scalar", failing)
    main_pretrain.main([str(word) for word in job_argv(images, tmp_path, *SHORT)])
    assert capsys.readouterr().out.count("no more TensorBoard events, since they can't be written: [Errno 28]") == 1
    assert (tmp_path / "checkpoint-0.pth").is_file()


def test_a_pipe_and_a_name_as_long_as_they_may_be_are_written_to(trained, images, tmp_path):
    """/dev/stdout is a link to a pipe that has no path; a temporary name must not be longer than the file's."""
    command = [sys.executable, "main_predict.py", *arguments(main_predict, trained, images / "val", "/dev/stdout")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(".png,") == 30, done.stderr
    with write_whole(tmp_path / ("x" * 251 + ".csv")) as unfinished:
        unfinished.write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write .*loop"), write_whole(tmp_path / "loop"):
        pass


def test_a_dash_is_standard_output_to_which_a_table_is_appended(trained, images, tmp_path):
    (tmp_path / "table.csv").write_text("before\n")
    command = [sys.executable, "main_predict.py", *arguments(main_predict, trained, images / "val", "-")]
    with (tmp_path / "table.csv").open("a") as table:
        done = subprocess.run(command, cwd=ROOT, stdout=table, stderr=subprocess.PIPE, text=True)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "before" and lines[1].startswith("file,") and len(lines) == 32, done.stderr
    assert done.returncode == 0 and "classes of 30 images written to -" in done.stderr


def test_messages_do_not_go_into_a_table_on_standard_output(trained, images, monkeypatch, capfd):
    classifier = models_load.classifier
    monkeypatch.setattr(models_load, "classifier", lambda *args: print("keeping the head") or classifier(*args))
    main_predict.main(arguments(main_predict, trained, images / "val", "-"))
    table, said = capfd.readouterr()
    assert table.startswith("file,") and len(table.splitlines()) == 31 and "keeping the head" in said


def test_a_device_is_written_to_whatever_its_folder_permits(tmp_path, monkeypatch):
    """Only root may write files into /dev."""
    monkeypatch.setattr(disk, "unwritable", lambda folder: f"{folder}: Permission denied")
    assert disk.unwritable_file(Path("/dev/null")) == ""
    assert "Permission denied" in disk.unwritable_file(tmp_path / "new.csv")
    assert disk.unwritable_file(tmp_path) == "it is a folder"


def test_names_that_no_file_can_have_do_not_exist(trained, images, tmp_path):
    with pytest.raises(UserError, match="no such file or folder: xxx"):
        main_predict.main(arguments(main_predict, trained, "x" * 300, tmp_path / "p.csv"))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(trained, images, tmp_path):
    with pytest.raises(UserError, match="can't be written to"):
        main_predict.main(arguments(main_predict, trained, images / "val", "/proc/none/p.csv"))

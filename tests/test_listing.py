"""Folders as people have them: links that lead back or nowhere, folders that can't be read, files of any kind."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from runs import job_argv

import main_finetune
import main_predict
import main_pretrain
from util import inference
from util.data import datasets, listing, splits
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Folder of two classes, a and b, with two images each, and a third image in a folder within a."""
    for name in ("a/1.png", "a/2.png", "a/deep/3.png", "b/1.png", "b/2.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "train" / name)
    return tmp_path / "train"


def listed(root, classes=("a", "b")):
    files = listing.list_files(str(root), list(classes), splits.is_image)
    return [f"{target} {os.path.relpath(path, root)}" for path, target in files], files.left_out


PLAIN = ["0 a/1.png", "0 a/2.png", "0 a/deep/3.png", "1 b/1.png", "1 b/2.png"]


@pytest.mark.parametrize(
    "links",
    [
        {"a/self": "."},
        {"a/up": ".."},
        {"a/top": "../.."},
        {"a/slash": "/"},
        {"a/deep/back": ".."},
        {"a/deep/back": "../../a"},
        {"a/twice": "deep"},
        {"a/a_link_that_sorts_first": "deep", "a/zz": "deep"},
        {"a/one": "two", "a/two": "one"},
        {"a/absolute": "ABSOLUTE/a"},
    ],
    ids=str,
)
def test_links_that_lead_back_add_nothing_and_are_counted(links, tree):
    for name, target in links.items():
        (tree / name).symlink_to(target.replace("ABSOLUTE", str(tree)))
    files, left_out = listed(tree)
    assert files == PLAIN
    assert len(left_out.repeated) + len(left_out.broken) == len(links)


def test_many_folders_that_link_to_each_other_are_listed_in_no_time(tree):
    """With n folders that each link to all others there are n! paths."""
    names = [f"n{number}" for number in range(12)]
    for name in names:
        (tree / "a" / name).mkdir()
        Image.new("L", (8, 8)).save(tree / "a" / name / "x.png")
        for other in names:
            (tree / "a" / name / f"to_{other}").symlink_to(f"../{other}")
    files, _ = listed(tree)
    assert files == [*PLAIN[:3], *(f"0 a/{name}/x.png" for name in sorted(names)), *PLAIN[3:]]


def test_a_link_to_another_class_is_followed(tree):
    (tree / "a" / "other").symlink_to("../b")
    assert listed(tree)[0] == [*PLAIN[:3], "0 a/other/1.png", "0 a/other/2.png", *PLAIN[3:]]


def test_a_class_that_is_a_link_does_not_lead_back_either(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tree / "a" / "1.png", tmp_path / "elsewhere" / "beside.png")
    shutil.move(tree / "a", tmp_path / "elsewhere" / "a")
    (tree / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "elsewhere" / "a" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "a" / "root").symlink_to(tree)
    assert listed(tree)[0] == PLAIN


def test_images_beside_a_validation_split_and_a_run_are_listed_without_theirs(tmp_path):
    """In DIR/*.jpg for pre-training, DIR/val/ is no training data, nor are the pictures of a run in DIR/output/run."""
    names = [
        "1.png",
        "2.png",
        "more/3.png",
        "val/a/4.png",
        "Testing/5.png",
        "output/run/reconstructions/epoch-0009.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 9).save(tmp_path / name)
    (tmp_path / "output" / "run" / ".lock").touch()
    _, train = splits.list_part(DataSpec(str(tmp_path)), "train", classes_optional=True)
    assert [train.name(index) for index in range(len(train))] == names[:3]
    folders = ", ".join(str(tmp_path / name) for name in ("Testing", "output/run", "val"))
    assert str(train.left_out) == f"3 folders of other splits or of runs ({folders})"
    _, val = splits.list_part(DataSpec(str(tmp_path)), "val")
    assert val.name(0) == "a/4.png" and str(val.left_out) == ""
    found = inference.find_images([tmp_path])  # for a script, all folders but the run's are images
    assert sorted(str(file.relative_to(tmp_path)) for file in found) == sorted(names[:-1])


# Folders that can't be read.

# Root reads everything unless it gives these rights up.
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
UNPRIVILEGED += ["--inh-caps", "-dac_override,-dac_read_search"]

# Close each folder in each way, in one process, since a start takes seconds, and print what finding images comes to.
CLOSE = """
import json, sys
from pathlib import Path
from util import inference
from util.errors import UserError

root, said = Path(sys.argv[1]), {}
for closed in ("a/deep", "a", "."):
    for mode in (0o000, 0o300, 0o600):
        before = (root / closed).stat().st_mode
        (root / closed).chmod(mode)
        try:
            said[f"{closed} {mode:o}"] = len(inference.find_images([root]))
        except (UserError, OSError) as error:
            said[f"{closed} {mode:o}"] = f"{type(error).__name__}: {error}"
        (root / closed).chmod(before)
print(json.dumps(said))
"""


def test_a_folder_that_cannot_be_read_is_named(tree):
    """Neither without any permission, nor without that to list it, nor without that to enter it."""
    command = [sys.executable, "-c", CLOSE, str(tree)]
    if os.getuid() == 0:
        if subprocess.run([*UNPRIVILEGED, "true"], capture_output=True).returncode:
            pytest.skip("root reads everything, and can't give that up here")
        command = [*UNPRIVILEGED, *command]
    said = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    # The names in a folder that can't be entered can be read, and in this one there is no folder.
    assert said.pop("a/deep 600") == 5
    for case, message in said.items():
        folder = re.escape(str((tree / case.split()[0]).resolve()))
        assert re.match(rf"UnreadableFolder: cannot read {folder}\S*: Permission denied", str(message)), (case, message)
    assert len(said) == 8


def test_a_validation_class_that_cannot_be_read_is_an_error(images, monkeypatch):
    """Pre-training does without a val/ that is no use, but not without knowing what is in it."""
    scan = listing.scan_folder

    def closed(path, *more, **named):
        if path.endswith("val/bag"):
            raise listing.UnreadableFolder(f"cannot read {path}: Permission denied")
        return scan(path, *more, **named)

    monkeypatch.setattr(listing, "scan_folder", closed)
    with pytest.raises(UserError, match="cannot read .*val/bag"):
        main_pretrain.main([str(word) for word in job_argv(images, "", "--num_workers", 0)])


# Files of other kinds.


def test_every_raster_format_of_pillow_is_taken_and_others_are_counted(tree):
    for name in ("x.gif", "x.AVIF", "x.jfif", "x.jp2", "x.tga", "x.qoi", "x.npy", "x.tiff"):
        (tree / "b" / name).touch()
    for name in ("x.pdf", "y.pdf", "x.eps", "x.wmf", "x.h5", "x.mp4", "x.txt", "README", ".hidden", "x.png.bak"):
        (tree / "b" / name).touch()
    files, left_out = listed(tree)
    assert len(files) == len(PLAIN) + 8
    assert left_out.endings == {".pdf": 2, ".eps": 1, ".wmf": 1, ".h5": 1, ".mp4": 1, ".txt": 1, "": 1, ".bak": 1}


def test_one_notice_counts_all_that_is_left_out(tree, capsys):
    (tree / "b" / "gone.png").symlink_to("nowhere.png")
    (tree / "b" / "loop.png").symlink_to("loop.png")
    os.mkfifo(tree / "b" / "pipe.png")
    (tree / "c").symlink_to("no_such_class")
    (tree / "b" / "up").symlink_to("..")
    (tree / "notes.txt").touch()
    shutil.copy(tree / "a" / "1.png", tree / "stray.png")
    images = datasets.open_split(datasets.Images, DataSpec(str(tree.parent)), "train", None, PixelSpec())
    assert len(images) == 5
    notice, end = capsys.readouterr().out.split("\n", 1)
    assert end == ""
    for words in (
        "1 file of other kinds (.txt 1)",
        "1 image beside the class folders (stray.png)",
        "4 broken links or special files",
        "1 link to folders that are in the list already",
    ):
        assert words in notice, notice


def test_pretraining_says_it_once(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data", symlinks=True)
    (tmp_path / "data" / "train" / "bag" / "x.txt").touch()
    argv = job_argv(tmp_path / "data", "", "--num_workers", 0, "--epochs", 2, "--monitor_freq", 1)
    main_pretrain.main([str(word) for word in argv])
    assert capsys.readouterr().out.count("left out of train, in") == 1


@pytest.mark.parametrize("name", ["valid", "Validation", "test"])
def test_a_missing_val_is_said_with_the_folder_that_may_be_meant(name, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data", symlinks=True)
    (tmp_path / "data" / "val").rename(tmp_path / "data" / name)
    argv = ["--num_workers", 0, "--epochs", 2, "--monitor_freq", 1]
    main_pretrain.main([str(word) for word in job_argv(tmp_path / "data", "", *argv)])
    out = capsys.readouterr().out
    assert "no val/ in" in out and f"there is {name}: rename it, or link val to it" in out
    with pytest.raises(UserError, match=rf"no folder .*val.*\(there is {name}: rename it"):
        main_finetune.main([str(word) for word in job_argv(tmp_path / "data", "", job="finetune")])


def test_a_folder_of_unreadable_kinds_names_them(tree, tmp_path):
    for file in (tree / "b").iterdir():
        file.rename(file.with_suffix(".cr2"))
    with pytest.raises(UserError, match=r"no images in .*train/b: .* 2 files of other kinds \(.cr2 2\)"):
        datasets.open_split(datasets.Images, DataSpec(str(tmp_path)), "train", None, PixelSpec())
    with pytest.raises(UserError, match=r"no images in .*/b: name a folder .*\(.cr2 2\)"):
        main_predict.main(["--resume", "x", "--images", str(tree / "b"), "--output", str(tmp_path / "p.csv")])

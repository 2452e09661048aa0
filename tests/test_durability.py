"""What is written under a temporary name is on the disk before it is renamed, and the renaming before the next step."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

import main_export
import models_mae
from scripts import pack
from util import disk
from util.checkpoint import files
from util.errors import UserError
from util.report.log import RunLog


class Recorder:
    """Notes which files are synchronised and renamed, and in which state they were."""

    def __init__(self, monkeypatch):
        self.synced, self.renamed, self.problems = {}, [], []
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def record_sync(descriptor):
            fsync(descriptor)
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.synced[path] = self.state(path)
            if Path(path).is_dir():
                self.renamed = [target for target in self.renamed if str(target.parent) != path]

        def record(function):
            def renaming(source, target, **keywords):
                source, target = Path(source).resolve(), Path(target).resolve()
                if self.synced.get(str(source)) != self.state(source):
                    self.problems.append(f"{source} was renamed before it was on the disk")
                function(source, target, **keywords)
                self.renamed.append(target)

            return renaming

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "replace", record(replace))
        monkeypatch.setattr(os, "rename", record(rename))

    @staticmethod
    def state(path):
        status = Path(path).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def check(self, *targets):
        assert not self.problems
        assert not self.renamed, "the folder was not synchronised after the renaming"
        assert all(Path(target).is_file() for target in targets)


@pytest.fixture
def recorder(monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    return Recorder(monkeypatch)


def test_checkpoints_are_on_the_disk_before_they_have_their_names(recorder, tmp_path):
    paths = [tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-last.pth"]
    files.write_checkpoint({"model": {"weight": torch.ones(3)}}, paths)
    recorder.check(*paths)
    assert len(recorder.synced) == 3  # both files and the folder


def test_small_files_are_on_the_disk_before_they_have_their_names(recorder, tmp_path):
    disk.write_text_whole(tmp_path / "log.txt", "one\n")
    disk.write_text_whole(tmp_path / "log.txt", "two\n")
    recorder.check(tmp_path / "log.txt")


def test_a_disk_that_cannot_flush_folders_is_no_reason_to_stop(tmp_path, monkeypatch):
    """As shared folders of virtual machines; a file that can't be flushed is one."""
    sync, refused = os.fsync, []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    disk.write_text_whole(tmp_path / "log.txt", "whole")
    assert (tmp_path / "log.txt").read_text() == "whole"
    refused.append(True)
    with pytest.raises(UserError, match="Invalid argument"):
        disk.write_text_whole(tmp_path / "log.txt", "other")
    assert (tmp_path / "log.txt").read_text() == "whole"


def test_exports_are_on_the_disk_before_they_replace_earlier_ones(recorder, tmp_path):
    model = models_mae.mae_vit_demo_patch4(img_size=8)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    for target in ("encoder", "timm"):
        main_export.main(["--resume", str(tmp_path / "mae.pth"), "--to", target, "--output", str(tmp_path / "out")])
    recorder.check(tmp_path / "out" / "model.safetensors", tmp_path / "out" / "README.md")


def test_shards_and_their_indexes_are_on_the_disk_before_they_have_their_names(recorder, images, tmp_path):
    pack.main([str(images / "val"), "--output", str(tmp_path / "val")])
    found = list((tmp_path / "val").glob("*.tar*"))
    recorder.check(*found)
    assert len(found) == 2


def test_a_log_that_is_cut_back_is_on_the_disk_before_it_has_its_name(recorder, tmp_path):
    """A run that resumes in epoch 1 takes the lines of that and later epochs out of log.txt."""
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n')
    RunLog(str(tmp_path), "", epoch=1, done=0.5)
    recorder.check(tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'

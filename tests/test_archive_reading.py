"""Reading from archives: the right bytes in every process, changes under a run, saved indexes."""

import errno
import multiprocessing
import os
import random
import re
import tarfile
from pathlib import Path

import archives
import faults
import numpy as np
import pytest
from archives import PNG, good, listed, opened, png, save_index
from runs import assert_same_end, finish, job_argv

from util import resources
from util.data import archives as reading
from util.data import splits, tar
from util.data.images import BadImage
from util.errors import LocalError

# Reading.


@pytest.mark.parametrize("length", [97, 98, 99, 100])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_about_as_long_as_their_field_are_read(length, kind, tmp_path):
    name = "./a/" + "x" * (length - 8) + ".png"
    archives.write(tmp_path / "train.tar", {f"./{name}": PNG, name[2:].replace("x.", "y."): PNG}, format=kind)
    assert [content for *_, content in listed(tmp_path)[1]] == [PNG, PNG]


def test_what_stands_in_front_of_all_names_is_no_part_of_them_in_any_form(tmp_path):
    archives.write(tmp_path / "train/cat.tar", {"x/train/1.png": PNG})
    archives.write(tmp_path / "train/dog.tar", {"x/train/1.png": PNG})
    assert [name for name, *_ in listed(tmp_path)[1]] == ["cat/1.png", "dog/1.png"]
    assert str(opened(tmp_path).samples[0][0]) == f"{tmp_path}/train/cat.tar/x/train/1.png"


def test_a_replaced_archive_on_a_network_disk_is_no_bad_image(tmp_path, monkeypatch):
    good(tmp_path / "train.tar")
    images = opened(tmp_path)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(LocalError, match="has changed since it was listed"):
        images[0]


def test_a_bad_member_is_a_bad_image_of_which_the_message_names_the_archive(tmp_path):
    archives.write(tmp_path / "train.tar", {"train/a/1.png": PNG, "train/a/2.png": PNG[:50], "train/a/3.png": b""})
    images = opened(tmp_path)
    for index, (name, reason) in enumerate([("2.png", ".*"), ("3.png", "not an image, or empty")], 1):
        with pytest.raises(BadImage, match=re.escape(f"{tmp_path}/train.tar/train/a/{name}: ") + reason):
            images[index]


def _check_reads(listing, contents, seed, count, problems):
    chance = random.Random(seed)
    for _ in range(count):
        index = chance.randrange(len(contents))
        if listing[index][0].read_bytes() != contents[index]:
            problems.put(index)
    problems.put(None)


def test_forked_workers_read_the_right_bytes(tmp_path):
    """After a read in the parent four workers read 2,500 members each, while the parent goes on reading."""
    contents = [random.Random(number).randbytes(1000 + 37 * number) for number in range(100)]
    for shard in range(4):
        members = {f"a/{number:03d}.png": contents[number] for number in range(shard, 100, 4)}
        archives.write(tmp_path / f"train/{shard}.tar", members)
    listing = splits.list_split(splits.find_split(str(tmp_path), "train"), "train")
    assert [listing[number][0].read_bytes() for number in range(100)] == contents
    context = multiprocessing.get_context("fork")
    problems = context.SimpleQueue()
    workers = [
        context.Process(target=_check_reads, args=(listing, contents, seed, 2500, problems)) for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    own = multiprocessing.SimpleQueue()
    _check_reads(listing, contents, 4, 200, own)
    assert own.get() is None
    assert [problems.get() for _ in workers] == [None] * 4
    for worker in workers:
        worker.join()


def test_hundreds_of_archives_with_few_open_files(tmp_path):
    """A run over 300 archives, with 2 workers, under `ulimit -n 64`."""
    for number in range(300):
        members = {f"{number % 10}/{number}.png": png(number % 256, 28)}
        archives.write(tmp_path / f"train/{number:03d}.tar", members)
    argv = job_argv(
        tmp_path, tmp_path / "out", "--num_workers", 2, "--batch_size", 64, "--epochs", 2, "--monitor_freq", 1
    )
    process = faults.start("pretrain", argv, tmp_path / "said", ("few_open_files", 64))
    assert faults.exit_code(process) == 0, (tmp_path / "said").read_text()[-2000:]


def test_archives_used_last_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_descriptors", type(reading._descriptors)())
    monkeypatch.setattr(resources, "allow_open_files", lambda _: 16)
    paths = [archives.write(tmp_path / f"{number}.tar", {"a/1.png": PNG}) for number in range(6)]
    for number in (0, 1, 2, 3, 0, 4, 5):
        reading.open_archive(str(paths[number]))
    assert [int(Path(path).stem) for path in reading._descriptors] == [3, 0, 4, 5]
    for path in list(reading._descriptors):
        os.close(reading._descriptors.pop(path))


def repack(path, change):
    """Replace an archive, keeping its inode, by one that differs."""
    members = {"a/1.png": png(1), "a/2.png": png(2), "a/3.png": png(3)}
    if change == "order":  # sizes and so all offsets stay the same
        members = dict(reversed(members.items()))
    elif change == "other size":
        members["a/3.png"] = PNG * 2
    elif change == "longer":
        members = {"a/0.png": PNG * 100, **members}
    archives.write(path, members)
    if change == "shorter":
        with path.open("r+b") as file:
            file.truncate(1024)


@pytest.mark.parametrize("change", ["order", "other size", "longer", "shorter", "removed"])
def test_an_archive_that_changes_under_its_index_is_noticed(change, tmp_path):
    repack(tmp_path / "train.tar", None)
    images = opened(tmp_path)
    if change == "removed":
        (tmp_path / "train.tar").unlink()
        os.close(reading._descriptors.pop(str(tmp_path / "train.tar")))
    else:
        repack(tmp_path / "train.tar", change)
    with pytest.raises(
        LocalError, match=r"train.tar( has changed since it was listed: .* where a/\d.png was|: No such)"
    ):
        for index in range(3):
            images[index]


def test_a_run_whose_archive_changes_stops_after_saving(images, undisturbed, tmp_path):
    """Nothing is trained on the wrong bytes, and the run resumes once the archive is back."""
    packed = archives.pack(images, tmp_path / "packed", "one")
    whole = (packed / "train.tar").read_bytes()
    argv = job_argv(packed, tmp_path, "--num_workers", 2, "--save_freq", 100)
    process = faults.start("pretrain", argv, tmp_path / "out", ("spoil_archive", str(packed / "train.tar"), 14))
    assert faults.exit_code(process) == 2
    said = (tmp_path / "out").read_text()
    assert "train.tar has changed since it was listed" in said and "Traceback" not in said, said
    assert (tmp_path / "checkpoint-last.pth").exists()
    (packed / "train.tar").write_bytes(whole)
    finish(packed, tmp_path, "--num_workers", 0)
    assert_same_end(tmp_path, undisturbed / "pretrain")


# Saved indexes.


def test_a_saved_index_is_read_instead_of_the_headers(images, tmp_path, monkeypatch):
    packed = archives.pack(images, tmp_path / "packed", "shards")
    expected = listed(packed)
    for archive in (packed / "train").glob("*.tar"):
        save_index(archive)
    monkeypatch.setattr(tar.HeaderReader, "members", lambda _: pytest.fail("the headers were read"))
    assert listed(packed) == expected


class RunsWhenLoaded:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "was run",)


@pytest.mark.parametrize("change", ["touched", "replaced", "cut index", "no index", "other offsets", "pickle"])
def test_a_saved_index_that_does_not_fit_is_not_believed(change, tmp_path):
    archive, saved = tmp_path / "train.tar", tmp_path / "train.tar.index"
    contents = {"a/1.png": png(1), "a/2.png": png(2), "a/3.png": png(3)}
    archives.write(archive, contents)
    save_index(archive)
    before = archive.stat()
    if change == "replaced":  # by one of the same size and time
        contents = dict(zip(contents, map(png, (3, 2, 1)), strict=True))
        archives.write(archive, dict(reversed(contents.items())))
        os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "touched":  # only in the middle
        contents = {"a/1.png": png(1), "a/22.png": png(4), "a/3.png": png(3)}
        archives.write(archive, contents)
        os.utime(archive, ns=(0, 0))
    elif change == "cut index":
        saved.write_bytes(saved.read_bytes()[:-100])
    elif change == "no index":
        saved.write_bytes(b"")
    else:
        with np.load(saved) as file:
            entries = dict(file)
        entries["offsets"] = entries["offsets"] + 512
        if change == "pickle":
            entries["names"] = np.array([RunsWhenLoaded(tmp_path)], object)
        with saved.open("wb") as file:
            np.savez(file, **entries)
    assert listed(tmp_path)[1] == [(name, 0, data) for name, data in contents.items()]
    assert not (tmp_path / "was run").exists()

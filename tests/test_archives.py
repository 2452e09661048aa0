"""Archives: a split in tar archives of any form is the split that its folders are, and bad archives are named."""

import errno
import io
import multiprocessing
import os
import random
import re
import shutil
import struct
import tarfile
from pathlib import Path

import archives
import faults
import numpy as np
import pytest
from archives import PNG, png
from runs import assert_same_end, finish, job_argv

import main_pretrain
from util import inference
from util.data import archive_index, datasets, splits, tar
from util.data import archives as reading
from util.data.images import BadImage, Pixels
from util.data.splits import DataSpec
from util.distributed import launchers
from util.errors import LocalError, UserError


def listed(data, split="train", flat=False):
    """Return the classes of a split, and (name, class, content) of each of its images, in order."""
    return archives.listed(splits.find_split(str(data), split, flat), split, flat)


def opened(data, split="train", kind=datasets.Images, **more):
    return datasets.open_split(kind, DataSpec(str(data)), split, None, Pixels(), **more)


# The same split, whatever its form.


@pytest.mark.parametrize("form", archives.FORMS)
def test_archives_list_what_the_folders_list(form, images, tmp_path):
    packed = archives.pack(images, tmp_path / "packed", form)
    for split in ("train", "val"):
        assert listed(packed, split) == listed(images, split)
        assert str(opened(packed, split).listing.left_out) == ""


NAMES = [
    "a/z.png",
    "a b/1.png",
    "a/b/1.png",
    "a/b c/1.png",
    "a/b/c/1.png",
    "a/B.PNG",
    "a-b/1.png",
    "ä/1.png",
    "a/ä.png",
    "a/日本.png",
    "a/\udce9t\udce9.png",  # bytes that are no UTF-8
    "a/new\nline.png",
    "a/" + "long" * 30 + ".png",
    "a/" + "f" * 120 + "/" + "g" * 150 + ".png",
    "a/.hidden.png",
    ".hidden/1.png",
    "a/.hidden/1.png",
    "a/._1.png",
    "a/notes.txt",
    "10/1.png",
    "9/1.png",
]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "train/", "/data/train/", "deep//./train/"])
def test_odd_names_are_those_of_the_folders(kind, prefix, tmp_path):
    """In order, without hidden files, with bytes of any encoding, and whatever stands in front of all names."""
    contents = {name: png(number) for number, name in enumerate(NAMES)}
    for name, data in contents.items():
        (tmp_path / "folders/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders/train" / name).write_bytes(data)
    (tmp_path / "folders/train/empty class").mkdir()
    members = random.Random(prefix).sample(sorted(contents.items()), len(contents))
    archive = archives.write(tmp_path / "train.tar", {prefix + name: data for name, data in members}, format=kind)
    with tarfile.open(archive, "a", format=kind) as file:
        folder = tarfile.TarInfo(f"{prefix}empty class/")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    assert listed(tmp_path) == listed(tmp_path / "folders")
    assert "empty class" in listed(tmp_path)[0] and len(listed(tmp_path)[1]) == 16


def raw(name, data, kind=b"0", size=None):
    """Return a member's header and content; `size` is what the header states instead of the content's size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def test_names_that_begin_as_other_archives_do(tmp_path):
    archives.write(tmp_path / "train.tar", {"PKLot/1.png": PNG, "BZh/1.png": PNG})
    assert listed(tmp_path)[0] == ["BZh", "PKLot"]


def test_long_names_of_the_ustar_format(tmp_path):
    name = "a/" + "f" * 90 + "/" + "g" * 60 + ".png"
    archives.write(tmp_path / "train.tar", {name: PNG, "b/1.png": PNG}, format=tarfile.USTAR_FORMAT)
    assert [stored for stored, *_ in listed(tmp_path)[1]] == [name, "b/1.png"]


def test_a_size_in_a_pax_header_counts(tmp_path):
    """As programs write those above 8 GiB, of members that are no images."""
    members = raw("x", b"12 size=700\n", b"x") + raw("a/1.bin", bytes(700), size=0) + raw("a/2.png", PNG)
    (tmp_path / "train.tar").write_bytes(members)
    assert listed(tmp_path)[1] == [("a/2.png", 0, PNG)]


def test_a_folder_written_as_a_file_is_a_folder(tmp_path):
    """As the oldest programs write them."""
    (tmp_path / "val.tar").write_bytes(raw("a/", b"", b"\0") + raw("b/1.png", PNG, b"\0") + bytes(1024))
    assert listed(tmp_path, "val")[0] == ["a", "b"]
    assert str(opened(tmp_path, "val", datasets.EvalImages).listing.left_out) == ""


def test_a_name_that_all_images_share_is_a_class_unless_it_is_the_splits(tmp_path):
    archives.write(tmp_path / "train.tar", {"cat/train/1.png": PNG, "cat/2.png": PNG})
    assert [name for name, *_ in listed(tmp_path)[1]] == ["cat/2.png", "cat/train/1.png"]


@pytest.mark.parametrize("program", ["tar --format=gnu", "tar --format=posix", "tar --format=ustar", "tar --format=v7"])
def test_archives_of_the_tar_program(program, images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "train")  # copies what the links lead to
    assert os.system(f"cd {tmp_path} && {program} -b 1 -cf train.tar train && mv train elsewhere") == 0
    assert listed(tmp_path) == listed(images)


def test_an_archive_that_is_a_link_and_lower_case_are_no_matter(tmp_path):
    archives.write(tmp_path / "elsewhere/x", {"a/1.png": PNG})
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.TAR").symlink_to(tmp_path / "elsewhere/x")
    assert [name for name, *_ in listed(tmp_path)[1]] == ["a/1.png"]


def test_a_fraction_chooses_the_same_images(images, tmp_path):
    packed = archives.pack(images, tmp_path / "packed", "shards")
    chosen = [datasets.TrainImages(opened(data), seed=3, fraction=0.4).chosen.tolist() for data in (images, packed)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 30


# Labels of WebDataset.


def sample(key, label, ending="cls"):
    return {f"{key}.png": PNG, f"{key}.{ending}": label if isinstance(label, bytes) else str(label).encode()}


def test_numbers_are_the_classes_own_and_in_numeric_order(tmp_path):
    members = {}
    for number in range(12):
        members |= sample(f"x{number:02d}", 11 - number)
    archives.write(tmp_path / "train/0.tar", members)
    classes, images = listed(tmp_path)
    assert classes == [f"class_{number}" for number in range(12)]
    assert [(name, target) for name, target, _ in images][10:] == [("class_10/x01.png", 10), ("class_11/x00.png", 11)]


def test_names_come_from_classes_txt_beside_the_shards_or_in_data_path(tmp_path):
    archives.write(tmp_path / "train/0.tar", {**sample("x", 1), **sample("y", 0)})
    (tmp_path / "classes.txt").write_text("zebra\nant\n")
    assert [(name, target) for name, target, _ in listed(tmp_path)[1]] == [("zebra/y.png", 0), ("ant/x.png", 1)]
    (tmp_path / "train/classes.txt").write_text("Zebra\nAnt\nBee\n")
    assert listed(tmp_path)[0] == ["Zebra", "Ant", "Bee"]


def test_a_json_label_and_a_name_as_label(tmp_path):
    members = {**sample("1", b'{"label": 0, "text": "\\u00e9"}', "json"), **sample("2", b'{"cls": "1"}', "json")}
    members |= {**sample("3", 1), "3.json": b"[]"}  # .cls is asked first
    archives.write(tmp_path / "train/0.tar", members)
    assert [target for _, target, _ in listed(tmp_path)[1]] == [0, 1, 1]
    archives.write(tmp_path / "train/0.tar", {**sample("1", b"dog"), **sample("2", b'{"label": "cat"}', "json")})
    assert [(name, target) for name, target, _ in listed(tmp_path)[1]] == [("cat/2.png", 0), ("dog/1.png", 1)]


def test_samples_of_several_shards_may_share_a_name(tmp_path):
    for shard in range(2):
        archives.write(tmp_path / f"train/{shard}.tar", {"0.png": png(shard), "0.cls": b"0"})
    assert [content for *_, content in listed(tmp_path)[1]] == [png(0), png(1)]


def test_metadata_beside_images_in_folders_are_no_labels(tmp_path):
    members = {"a/x.1.png": PNG, "a/x.1.json": b"{}", "a/x.2.png": PNG, "a/x.2.json": b"[", "b/x.png": PNG}
    members |= {"b/x.json": b'{"label": "b"}', "c/y.png": PNG, "c/y.json": b'{"label": [1, 2]}'}
    archives.write(tmp_path / "train.tar", members)
    assert [name for name, *_ in listed(tmp_path)[1]] == ["a/x.1.png", "a/x.2.png", "b/x.png", "c/y.png"]


@pytest.mark.parametrize(("ending", "label"), [("cls", b"a"), ("json", b'{"label": 3}'), ("json", b'{"cls": "dog"}')])
def test_labels_beside_images_in_folders_matter_for_classes_only(ending, label, tmp_path):
    members = {"a/1.png": PNG, "b/2.png": PNG, f"b/2.{ending}": label}
    archives.write(tmp_path / "train/0.tar", members)
    assert listed(tmp_path, flat=True)[0] == ["a", "b"]
    with pytest.raises(UserError, match=f"b/2.{ending} is the label of an image in a folder, .*without folders"):
        opened(tmp_path)


@pytest.mark.parametrize("label", [b'{"label": [1, 2]}', b'{"label": "a photograph / of"}', b'{"label": -1}'])
def test_pretraining_needs_no_labels_that_are_classes(label, tmp_path):
    archives.write(tmp_path / "train/0.tar", {**sample("1", label, "json"), **sample("2", label, "json")})
    assert listed(tmp_path, flat=True) == ([""], [("1.png", 0, PNG), ("2.png", 0, PNG)])
    with pytest.raises(UserError, match="which is no class|needs a .cls"):
        opened(tmp_path)


def test_a_byte_order_mark_belongs_to_no_name(tmp_path):
    archives.write(tmp_path / "train/0.tar", sample("x", 0))
    (tmp_path / "classes.txt").write_bytes("\ufefftench\r\n".encode())
    assert listed(tmp_path)[0] == ["tench"]


def test_different_numbers_of_numbered_classes_are_said_with_the_remedy(tmp_path):
    archives.write(tmp_path / "train/0.tar", {**sample("x", 0), **sample("y", 1)})
    archives.write(tmp_path / "val/0.tar", sample("x", 0))
    splits_ = opened(tmp_path), opened(tmp_path, "val", datasets.EvalImages)
    with pytest.raises(UserError, match="only in .*train: class_1; a classes.txt in --data_path names"):
        datasets.check_classes(*splits_, 2)


# Pre-training without classes.


@pytest.mark.parametrize("place", ["train.tar", "train/0.tar", "0.tar"])
def test_images_without_classes_for_pretraining(place, tmp_path):
    folder = tmp_path / "folder/train"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    members = {f"{number}.png": png(number) for number in (2, 0, 1)}
    if place != "train.tar":
        members |= {f"{number}.json": b'{"caption": "a photograph"}' for number in range(3)}
    archives.write(tmp_path / place, members)
    assert listed(tmp_path, flat=True) == listed(tmp_path / "folder", flat=True)
    archives.write(tmp_path / "val.tar", {"a/1.png": PNG})  # is not one of the training archives
    assert len(listed(tmp_path, flat=True)[1]) == 3
    with pytest.raises(UserError, match="has no class folders|no label|no folder"):
        opened(tmp_path)


def test_images_and_archives_of_several_splits_in_data_path_are_refused(tmp_path):
    archives.write(tmp_path / "in-train-0.tar", {"a/1.png": PNG})
    archives.write(tmp_path / "in-validation-0.TAR", {"a/1.png": PNG})
    with pytest.raises(UserError, match="archives of several splits, such as in-validation-0.TAR: move"):
        opened(tmp_path, flat=True)
    (tmp_path / "in-validation-0.TAR").unlink()
    (tmp_path / "1.png").write_bytes(PNG)
    with pytest.raises(UserError, match=r"holds archives \(in-train-0.tar\) beside images \(1.png\)"):
        opened(tmp_path, flat=True)


def test_an_archive_without_end_mark_is_read_with_a_notice(tmp_path, capsys):
    (tmp_path / "train.tar").write_bytes(raw("a/1.png", PNG))
    save_index(tmp_path / "train.tar")
    for _ in range(2):
        assert len(opened(tmp_path)) == 1
        assert "1 archive without an end mark, of which a part may be missing" in capsys.readouterr().out
        (tmp_path / "train.tar.index").unlink(missing_ok=True)


def test_scripts_say_that_an_archive_has_no_end_mark(tmp_path, capsys):
    (tmp_path / "some.tar").write_bytes(raw("a/1.png", PNG))
    assert len(inference.find([tmp_path / "some.tar"])) == 1
    assert "1 archive without an end mark, of which a part may be missing" in capsys.readouterr().err


@pytest.mark.parametrize("length", [97, 98, 99, 130])
def test_long_names_that_a_header_shortens_are_read(length, tmp_path):
    """As libarchive writes them: the header has the beginning of the name and a zero, the pax header the whole name."""
    name = f"a/{'x' * (length - 4)}.png"
    shortened = name if length < 98 else name[:96]
    header = raw("PaxHeader/x", f"{len(name) + 10} path={name}\n".encode(), b"x")
    (tmp_path / "train.tar").write_bytes(header + raw(shortened, PNG) + bytes(1024))
    classes, found = listed(tmp_path)
    assert classes == ["a"] and found[0][2] == PNG and found[0][0] == name


def test_a_folder_is_read_rather_than_the_archive_beside_it(images, tmp_path, capsys):
    archives.write(tmp_path / "train.tar", {"a/1.png": PNG})
    (tmp_path / "train").symlink_to(images / "train")
    assert len(opened(tmp_path)) == 80
    assert f"notice: {tmp_path}/train.tar is not read, since there is {tmp_path}/train" in capsys.readouterr().out


def test_an_archive_that_one_rank_cannot_open_does_not_divide_the_ranks(tmp_path, monkeypatch):
    """All open the split alike; drawing an image is what fails, where ranks stop together."""
    good(tmp_path / "train.tar")

    def lost(path, pixels):
        raise LocalError("gone")

    monkeypatch.setattr(datasets, "load_array", lost)
    images = opened(tmp_path)
    with pytest.raises(LocalError, match="gone"):
        images[0]


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
    monkeypatch.setattr(launchers, "allow_open_files", lambda _: 16)
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


def save_index(archive):
    with archive.with_name(f"{archive.name}.index").open("wb") as file:
        archive_index.write_index(archive, file)


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


# Bad archives.


def good(path):
    return archives.write(path, {"a/1.png": PNG, "b/2.png": PNG * 9})


def compressed(path, mode="w:gz", name="train.tar.gz"):
    with tarfile.open(path / name, mode) as file:
        archives.add(file, "a/1.png", PNG)


def cut(path, size):
    good(path / "train.tar")
    with (path / "train.tar").open("r+b") as file:
        file.truncate(size)


def with_member(path, **header):
    with tarfile.open(path / "train.tar", "w") as file:
        archives.add(file, "a/0.png", PNG)
        archives.add(file, header.pop("name", "a/1.png"), header.pop("data", b""), **header)


def flip(path, position):
    good(path / "train.tar")
    data = bytearray((path / "train.tar").read_bytes())
    data[position] ^= 4
    (path / "train.tar").write_bytes(data)


def sparse_of_gnu_tar(path):
    with (path / "hole.png").open("wb") as file:
        file.write(PNG)
        file.truncate(1 << 20)
    assert os.system(f"cd {path} && mkdir a && mv hole.png a && tar -Scf train.tar a") == 0


def pax_sparse(path):
    with tarfile.open(path / "train.tar", "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a/GNUSparseFile.1/1.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a/1.png"}
        info.size = len(PNG)
        file.addfile(info, io.BytesIO(PNG))


def joined(path):
    good(path / "1.tar"), good(path / "2.tar")
    (path / "train.tar").write_bytes((path / "1.tar").read_bytes() + (path / "2.tar").read_bytes())


def nested(path):
    good(path / "n01440764.tar")
    archives.write(path / "train.tar", {"n01440764.tar": (path / "n01440764.tar").read_bytes()})


def zipped(path):
    shutil.make_archive(str(path / "train"), "zip", root_dir=path)


def among_folders(path):
    good(path / "train/extra.tar")
    (path / "train/cats").mkdir()


def two_shards(path, first, second):
    archives.write(path / "train/0.tar", first)
    archives.write(path / "train/1.tar", second)


def hole(path, where, size):
    """Overwrite a part of an archive of a hundred images with zeros, as a download that skipped it."""
    data = archives.write(path / "train.tar", {f"a/{number:02d}.png": PNG for number in range(100)}).read_bytes()
    write_bytes(path, data[:where] + bytes(size) + data[where + size :])


def with_size(field):
    header = bytearray(raw("a/1.png", PNG)[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def write_bytes(path, data):
    (path / "train.tar").write_bytes(data)


BAD = {
    "gzip": (compressed, "train.tar.gz can't be read in place: it is compressed: gunzip it"),
    "gzip named tar": (lambda p: compressed(p, name="train.tar"), "train.tar can't be read .* gunzip"),
    "bzip2": (lambda p: compressed(p, "w:bz2", "train.tar.bz2"), "bunzip2"),
    "xz": (lambda p: compressed(p, "w:xz", "train.tar.xz"), "unxz"),
    "zstd": (lambda p: (p / "train.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20)), "unzstd"),
    "tar named tgz": (lambda p: good(p / "train.tgz"), "train.tgz is a plain tar archive: rename it"),
    "a compressed shard": (
        lambda p: (good(p / "train/0.tar"), compressed(p / "train", name="1.tar.gz")),
        "1.tar.gz can't be read in place",
    ),
    "a zip named tar": (
        lambda p: (zipped(p), (p / "train.zip").rename(p / "train.tar")),
        "train.tar can't be read in place: it is a zip archive",
    ),
    "zip": (zipped, r"train.zip can't be read in place: .*python scripts/pack.py ARCHIVE --output DIR"),
    "cut in the last member": (lambda p: cut(p, 2048), "train.tar is cut off: it has 2,048 bytes, .* until 2,"),
    "cut in padding": (lambda p: cut(p, 800), "train.tar is cut off: it has 800 bytes, .* until 1,024"),
    "cut in a header": (lambda p: cut(p, 1300), r"train.tar is cut off \(at byte 1,024\)"),
    "empty file": (lambda p: write_bytes(p, b""), "train.tar is an empty file"),
    "nothing in it": (lambda p: archives.write(p / "train.tar", {}), "no images in .*train.tar: are they complete"),
    "no images": (
        lambda p: archives.write(p / "train.tar", {"a/x.txt": b"", "a/y.txt": b""}),
        r"no images in .*2 files of other kinds \(.txt 2\)",
    ),
    "zeros": (lambda p: write_bytes(p, bytes(10240)), "no images in .*train.tar"),
    "not a tar": (lambda p: write_bytes(p, PNG * 30), r"train.tar is no tar archive \(at byte 0\)"),
    "a damaged header": (lambda p: flip(p, 1024 + 3), r"train.tar is damaged \(at byte 1,024\)"),
    "a damaged size": (lambda p: flip(p, 124 + 10), r"train.tar is no tar archive \(at byte 0\)"),
    "a name without end": (
        lambda p: write_bytes(p, raw("x", bytes(2 << 20), b"L") + raw("a/1.png", PNG)),
        r"train.tar is damaged \(at byte 512\)",
    ),
    "joined": (joined, "train.tar goes on after its end mark"),
    "a hole": (lambda p: hole(p, 20 << 10, 100), r"train.tar is damaged \(at byte 20,480\)"),
    "a long hole": (lambda p: hole(p, 20 << 10, 30 << 10), r"train.tar goes on after its end mark \(at byte 20,480\)"),
    "nothing after a hole": (
        lambda p: write_bytes(p, raw("a/1.png", PNG) + bytes(9 << 20)),
        "train.tar ends in 5,[0-9,]* bytes of zeros",
    ),
    "joined after long padding": (
        lambda p: write_bytes(p, raw("a/1.png", PNG) + bytes(1 << 20) + raw("a/2.png", PNG)),
        "train.tar goes on after its end mark",
    ),
    "a negative size": (lambda p: write_bytes(p, with_size(b"-0000001000\0")), r"train.tar is no tar archive"),
    "a linked class": (
        lambda p: with_member(p, name="cat", type=tarfile.SYMTYPE, linkname="elsewhere/cat"),
        "train.tar/cat is a link",
    ),
    "a class of other files": (
        lambda p: archives.write(p / "train.tar", {"a/1.png": PNG, "svgs/2.svg": b""}),
        r"no images in .*train.tar/svgs: .*\(.svg 1\)",
    ),
    "archives inside": (nested, r"\(.tar 1\).*prepare_imagenet.py --packed"),
    "symbolic link": (
        lambda p: with_member(p, type=tarfile.SYMTYPE, linkname="0.png"),
        "train.tar/a/1.png is a link, .*tar --dereference --hard-dereference",
    ),
    "hard link": (lambda p: with_member(p, type=tarfile.LNKTYPE, linkname="a/0.png"), "a/1.png is a link"),
    "pipe": (lambda p: with_member(p, type=tarfile.FIFOTYPE), "a/1.png is a special file"),
    "sparse, GNU": (sparse_of_gnu_tar, "holds a sparse file, a/hole.png"),
    "sparse, pax": (pax_sparse, "holds a sparse file, a/"),
    "..": (lambda p: with_member(p, name="../../b/1.png"), r"a member named ../../b/1.png, outside of any folder"),
    "hidden ..": (lambda p: with_member(p, name="a/../../1.png"), "a member named a/../../1.png, outside"),
    "twice": (lambda p: with_member(p, name="a/0.png"), "a/0.png and .*a/0.png have one name, a/0.png"),
    "twice over shards": (lambda p: two_shards(p, {"a/1.png": PNG}, {"./a/1.png": PNG}), "0.tar/a/1.png and .*1.tar/"),
    "twice as sample": (
        lambda p: two_shards(p, {**sample("a", 0), "./a.png": PNG}, sample("b", 0)),
        "a.png and .*a.png belong to one sample",
    ),
    "two images of a sample": (
        lambda p: two_shards(p, {**sample("a", 0), "a.seg.png": PNG}, {}),
        "a.png and .*a.seg.png belong to one sample",
    ),
    "two labels of a sample": (
        lambda p: two_shards(p, {"a.png": PNG, "a.1.cls": b"0", "a.2.cls": b"1"}, {}),
        "a.1.cls and .*a.2.cls belong to one sample",
    ),
    "labels in folders": (
        lambda p: archives.write(p / "train.tar", {"00/1.png": PNG, "00/1.cls": b"5"}),
        "00/1.cls is the label of an image in a folder",
    ),
    "an empty shard": (lambda p: two_shards(p, {"1.png": PNG}, {}), "no images in .*train/1: add some"),
    "some in folders": (
        lambda p: two_shards(p, {"a/1.png": PNG}, {"2.png": PNG}),
        r"some images are in folders \(.*0.tar/a/1.png\) and some are not \(.*1.tar/2.png\)",
    ),
    "a shard among folders": (
        among_folders,
        r"train holds archives \(extra.tar\) beside folders \(cats\), and only one",
    ),
    "a shard among images": (
        lambda p: (good(p / "train/0.tar"), (p / "train/1.png").write_bytes(PNG)),
        r"beside images \(1.png\)",
    ),
    "no label": (lambda p: two_shards(p, sample("a", 0), {"b.png": PNG}), "1.tar/b.png has no label"),
    "no label in json": (lambda p: two_shards(p, sample("a", b"{}", "json"), {}), "a.png has no label"),
    "negative label": (lambda p: two_shards(p, sample("a", -1), sample("b", 0)), "a.cls has the label -1"),
    "huge label": (lambda p: two_shards(p, sample("a", 10**9), {}), "has the label 1000000000, which is no class"),
    "a label of half a character": (
        lambda p: two_shards(p, sample("a", b'{"label": "\\ud800"}', "json"), {}),
        "which is no class",
    ),
    "a label with slash": (lambda p: two_shards(p, sample("a", b"x/y"), {}), "has the label 'x/y'"),
    "a true label": (lambda p: two_shards(p, sample("a", b'{"label": true}', "json"), {}), "has the label True"),
    "no JSON": (lambda p: two_shards(p, sample("a", b"{", "json"), {}), "a.json can't be read as a label"),
    "no text": (lambda p: two_shards(p, sample("a", b"\xff"), {}), "a.cls can't be read as a label"),
    "mixed labels": (lambda p: two_shards(p, sample("a", 0), sample("b", b"dog")), "such as 'dog'"),
    "too few names": (
        lambda p: (two_shards(p, sample("a", 2), {}), (p / "classes.txt").write_text("x\ny\n")),
        "classes.txt names 2 classes, and there is a label 2",
    ),
    "one name twice": (
        lambda p: (two_shards(p, sample("a", 1), {}), (p / "classes.txt").write_text("x\nx\n")),
        "classes.txt needs a name without / per line, each once: 'x'",
    ),
    "a gap": (lambda p: two_shards(p, sample("a", 0), sample("b", 2)), "no images in .*class_1: add some"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_ends_in_one_message(case, tmp_path, refusal):
    make, message = BAD[case]
    (tmp_path / "train").mkdir()
    make(tmp_path)
    if not any((tmp_path / "train").iterdir()):
        (tmp_path / "train").rmdir()
    said = refusal(lambda: opened(tmp_path))
    assert re.search(message, said) and len(said.splitlines()) == 1, said


def test_windows_cannot_read_in_place(tmp_path, monkeypatch):
    good(tmp_path / "train.tar")
    monkeypatch.delattr(os, "pread")
    with pytest.raises(UserError, match="train.tar can't be read in place on Windows: unpack it"):
        opened(tmp_path)


def test_an_unusable_val_is_said_and_pretraining_goes_on(images, tmp_path, capsys):
    packed = archives.pack(images, tmp_path / "packed", "one")
    (packed / "val.tar").write_bytes((packed / "val.tar").read_bytes()[:5000])
    main_pretrain.main([str(word) for word in job_argv(packed, "", "--num_workers", 0, "--epochs", 2)])
    assert "val/ is not used for monitoring: " in capsys.readouterr().out


def test_a_validation_archive_without_images_is_a_class_without_images(tmp_path, capsys):
    archives.write(tmp_path / "val/a.tar", {"1.png": PNG})
    archives.write(tmp_path / "val/b.tar", {})
    assert opened(tmp_path, "val", datasets.EvalImages).counts().tolist() == [1, 0]
    assert "1 of 2 classes have no images" in capsys.readouterr().out


def test_a_missing_val_is_said_with_the_archive_that_may_be_meant(tmp_path):
    good(tmp_path / "train.tar"), good(tmp_path / "valid.tar")
    with pytest.raises(
        UserError, match=r"no folder .*val: .*or val.tar \(there is valid.tar: rename it, or link val.tar"
    ):
        opened(tmp_path, "val")


def test_damaged_headers_never_give_other_bytes(tmp_path):
    """One to three changed bytes: the archive is refused, or every image is as it was."""
    contents = {f"{name}/{number}.png": png(number) for name in "ab" for number in range(4)}
    archive = archives.write(tmp_path / "train.tar", contents)
    whole, chance = archive.read_bytes(), random.Random(0)
    headers = range(0, 1024 * len(contents), 1024)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.choice(headers) + chance.randrange(512)] = chance.randrange(256)
        archive.write_bytes(data)
        try:
            assert {name: content for name, _, content in listed(tmp_path)[1]}.items() <= contents.items()
        except UserError:
            refused += 1
    assert refused > 200


def test_large_sizes_and_old_checksums_are_understood():
    """Binary numbers of sizes above 8 GiB, and checksums of signed bytes, as some old programs wrote them."""
    info = tarfile.TarInfo("é.png")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert tar.parse(header)[:2] == ("é.png".encode(), 9 << 30)
    signed = sum(struct.unpack("148b8x356b", header)) + 256
    assert tar.parse(header[:148] + b"%06o\0 " % signed + header[156:])[1] == 9 << 30

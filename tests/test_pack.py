"""scripts/pack.py: whatever the source is, the shards list what it holds, and a run that was cut off can go on."""

import io
import os
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path

import archives
import pytest
from archives import PNG, png
from packs import SMALL, a_zip, contents, gzipped, listed, run, times, tree, write_parquet, zipped

from util.data import archive_index
from util.errors import UserError
from util.packing import shards, writing

NAMES = {"train": 80, "val": 30}


# Folders.


def test_both_splits_of_a_folder_list_what_it_lists(images, tmp_path, capsys):
    run(images, "--output", tmp_path / "packed")
    for split, count in NAMES.items():
        assert listed(tmp_path / "packed" / split) == listed(images / split)
        assert len(listed(images / split)[1]) == count
    printed = capsys.readouterr()
    assert "train: 80 images of 10 classes, 1 shard, 112,640 bytes; 1 shard written now" in printed.out
    assert printed.err == ""


def test_several_shards_list_what_the_folder_lists_and_none_is_too_large(images, packed):
    assert listed(packed) == listed(images / "train")
    files = sorted(packed.glob("*.tar"))
    assert [file.name for file in files] == [f"shard-{number:05d}.tar" for number in range(len(files))]
    assert len(files) == 6 and all(file.stat().st_size <= SMALL for file in files)
    assert all(archive_index.has_current_index(file) for file in files)


def test_an_image_that_is_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    large = PNG + bytes(50000)
    source = tree(tmp_path / "in", {"a/1.png": large, "a/2.png": PNG, "a/3.png": large, "a/4.png": PNG})
    run(source, "--output", tmp_path / "out", "--shard_size", "10K")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert [size > 10240 for size in sizes] == [True, False, True, False]
    assert listed(tmp_path / "out") == listed(source)


def test_a_shard_may_be_exactly_as_large_as_allowed(tmp_path):
    """Two files of 3,584 bytes with headers of 512, and the end mark of 1,024, are within 10,240 bytes; three not."""
    source = tree(tmp_path / "in", {f"a/{number}.png": bytes(3584) for number in range(4)})
    run(source, "--output", tmp_path / "out", "--shard_size", 10240)
    assert [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")] == [10240, 10240]


def test_a_second_run_writes_nothing_and_another_place_gets_the_same_bytes(images, packed, tmp_path, capsys):
    before = times(packed)
    run(images / "train", "--output", packed, "--shard_size", SMALL)
    assert times(packed) == before and "6 shards, 112,640 bytes; nothing to write" in capsys.readouterr().out
    run(images / "train", "--output", tmp_path / "again", "--shard_size", "20K")
    assert contents(tmp_path / "again") == contents(packed)


def killed(main, *words):
    """Run the script in a process that kills itself, which `main` provides for."""
    pid = os.fork()
    if pid == 0:
        try:
            main()
            run(*words)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def dying(function, call, before):
    """Return a function that does the same, but whose call of this number, from 1, ends the process."""
    calls = [0]

    def count(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return count


POINTS = {  # object, function, call and whether the process ends before it; complete shards by then, indexes
    "within the first shard": (tarfile.TarFile, "addfile", 5, True, 0, 0),
    "within the third shard": (tarfile.TarFile, "addfile", 40, True, 2, 2),
    "while a shard is read back": (shards, "_compare", 2, True, 1, 1),
    "before a shard gets its name": (os, "replace", 3, True, 1, 1),
    "before a shard's index": (writing, "write_saved_index", 2, True, 2, 1),
    "between shards": (writing, "write_saved_index", 2, False, 2, 2),
    "after the last shard": (writing, "write_saved_index", 6, True, 6, 5),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_with_the_first_missing_shard(point, images, packed, tmp_path, capsys):
    place, name, call, before, whole, indexes = POINTS[point]
    words = (images / "train", "--output", tmp_path, "--shard_size", SMALL)
    killed(lambda: setattr(place, name, dying(getattr(place, name), call, before)), *words)
    there = times(tmp_path)
    assert sum(name.endswith(".tar") and name[0] != "." for name in there) == whole
    assert sum(name.endswith(".index") and name[0] != "." for name in there) == indexes

    # Whole shards are left as they are, and nothing unfinished remains.
    run(*words)
    printed = capsys.readouterr().out
    assert (f"{6 - whole} shards written now" if whole < 6 else "nothing to write") in printed
    assert ("1 index added" in printed) == (whole > indexes)
    assert {name: time for name, time in times(tmp_path).items() if name in there} == {
        name: time for name, time in there.items() if name[0] != "."
    }
    assert contents(tmp_path) == contents(packed) and times(tmp_path).keys() == times(packed).keys()
    assert all(archive_index.has_current_index(path) for path in tmp_path.glob("*.tar"))


def test_a_shard_that_was_removed_is_written_again(images, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "shard-00002.tar").unlink()
    run(images / "train", "--output", folder, "--shard_size", SMALL)
    assert contents(folder) == contents(packed) and archive_index.has_current_index(folder / "shard-00002.tar")


def test_two_processes_do_not_write_to_one_folder(images, tmp_path, refusal):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        writing._lock(tmp_path / "out")
        os.write(write_end, b"locked")
        signal.pause()
    os.read(read_end, 6)
    try:
        message = refusal(lambda: run(images / "train", "--output", tmp_path / "out"))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert f"is being written to by process {pid}" in message


NAMES_THAT_ARE_ODD = [
    "a/z.png",
    "a b/1.png",
    "a/b/1.png",
    "a/b c/1.png",
    "a/B.PNG",
    "ä/1.png",
    "a/日本.png",
    "a/\udce9t\udce9.png",  # bytes that are no UTF-8
    "\udcff/1.png",
    "a/new\nline.png",
    "a/back\\slash.png",
    "a/" + "f" * 94 + ".png",  # 100 bytes, as many as a header has room for, and one more
    "a/" + "f" * 95 + ".png",
    "a/" + "f" * 120 + "/" + "g" * 150 + ".png",
    "ü" * 120 + "/" + "ü" * 120 + ".png",
    "a/empty.png",
]


def test_odd_names_and_empty_classes_survive(tmp_path, capsys):
    members = {name: b"" if "empty" in name else png(number) for number, name in enumerate(NAMES_THAT_ARE_ODD)}
    others = {"a/.hidden.png": PNG, ".hidden/1.png": PNG, "a/notes.txt": b"", "no images": None, "n" * 150: None}
    source = tree(tmp_path / "in", members | others)
    run(source, "--output", tmp_path / "out", "--shard_size", "10K")
    assert listed(tmp_path / "out") == listed(source)
    assert {"no images", "n" * 150} <= set(listed(tmp_path / "out")[0]) and len(listed(source)[1]) == len(members)
    assert "left out: 1 file of other kinds (.txt 1)" in capsys.readouterr().err
    with tarfile.open(tmp_path / "out/shard-00000.tar") as archive:
        assert archive.getnames()[:2] == ["n" * 150, "no images"]


def test_images_without_classes_go_into_one_folder(tmp_path, capsys):
    source = tree(tmp_path / "in", {f"{number}.png": png(number) + bytes(5000) for number in range(4)})
    run(source, "--output", tmp_path / "out/train", "--shard_size", "10K")
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 4
    expected = [(f"images/{name}", *rest) for name, *rest in listed(source, classes_optional=True)[1]]
    assert listed(tmp_path / "out/train", classes_optional=True) == (["images"], expected)
    printed = capsys.readouterr().out
    assert (
        "no class folders, and go into one folder, images/" in printed and "images without classes, 4 shards" in printed
    )


def test_a_folder_of_one_split_alone_keeps_its_name(images, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train").symlink_to(images / "train")
    run(tmp_path / "in", "--output", tmp_path / "out")
    assert listed(tmp_path / "out/train") == listed(images / "train")


def test_images_beside_val_are_those_of_train(tmp_path, capsys):
    tree(tmp_path / "in", dict.fromkeys(["1.png", "2.png", "val/a/3.png", "test/a/4.png"], PNG))
    run(tmp_path / "in", "--output", tmp_path / "out")
    assert [name for name, *_ in listed(tmp_path / "out/train")[1]] == ["images/1.png", "images/2.png"]
    assert [name for name, *_ in listed(tmp_path / "out/val")[1]] == ["a/3.png"]
    assert f"notice: not packed: test in {tmp_path / 'in'}" in capsys.readouterr().err


def test_train_is_a_class_among_others(tmp_path):
    source = tree(tmp_path / "in", {"bus/1.png": PNG, "train/1.png": PNG})
    run(source, "--output", tmp_path / "out")
    assert listed(tmp_path / "out") == listed(source)


def test_one_split_beside_other_folders_is_packed_as_that_split(tmp_path, capsys):
    source = tree(
        tmp_path / "in", dict.fromkeys(["train/cat/1.png", "train/dog/1.png", "annotations/masks/1.png"], PNG)
    )
    run(source, "--output", tmp_path / "out")
    assert listed(tmp_path / "out/train") == listed(source / "train")
    assert "not packed: annotations in" in capsys.readouterr().err


def test_a_folder_around_the_classes_is_told(tmp_path, capsys):
    run(a_zip("images/cat/1.png", "images/dog/1.png", name="pets.zip")(tmp_path), "--output", tmp_path / "out")
    assert "all images lie in folders of images, which is taken as the only class" in "".join(capsys.readouterr())
    assert listed(tmp_path / "out")[0] == ["images"]


def test_names_of_classes_do_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    archives.write(tree(tmp_path, {"train": None}) / "train/0.tar", {"0.png": PNG, "0.cls": b"1"})
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    monkeypatch.chdir(tmp_path / "train")
    run(".", "--output", tmp_path / "out")
    assert listed(tmp_path / "out")[0] == ["ant", "bee"]


def without_utf8_flag(path):
    """Clear the flag that a name is UTF-8 in each header of a zip, its members' own and those of its directory."""
    data = path.read_bytes()
    for signature, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data = data[: start + place] + bytes([data[start + place] & ~8]) + data[start + place + 1 :]
    path.write_bytes(data)


def test_names_of_a_zip_are_utf8_if_they_can_be_else_code_page_437(tmp_path):
    """macOS writes UTF-8 without zip's flag for it. Bytes that are no UTF-8 are the code page's, as zip's rules say."""
    members = {"caf\u00e9/1.png": PNG, "zoo/\u732b.png": PNG}
    without_utf8_flag(zipped(tmp_path / "0.zip", members))
    old = zipped(tmp_path / "1.zip", {"CAFE/1.png": PNG})
    old.write_bytes(old.read_bytes().replace(b"CAFE", b"caf\x82"))
    zipped(
        tmp_path / "2.zip", {"caf\u251c\u2310/1.png": PNG}
    )  # with the flag: what looks like a wrong code page is none
    for name in ("0.zip", "1.zip", "2.zip"):
        run(tmp_path / name, "--output", tmp_path / name[0])
    assert listed(tmp_path / "0") == (["caf\u00e9", "zoo"], [("caf\u00e9/1.png", 0, PNG), ("zoo/\u732b.png", 1, PNG)])
    assert listed(tmp_path / "1") == (["caf\u00e9"], [("caf\u00e9/1.png", 0, PNG)])
    assert listed(tmp_path / "2")[0] == ["caf\u251c\u2310"]


def test_labels_of_other_folders_are_none_of_an_image(tmp_path):
    members = {"dog/a.png": PNG, "cat/b.png": PNG, "meta/a.cls": b"1"}
    run(zipped(tmp_path / "x.zip", members), "--output", tmp_path / "out")
    assert listed(tmp_path / "out")[0] == ["cat", "dog"]


def test_backslashes_in_a_zip_are_folders(tmp_path):
    infos = [zipfile.ZipInfo(name) for name in ("bee/", "cat/0.png", "dog/0.png")]
    for info in infos:
        info.filename = info.filename.replace("/", "\\")
    members = {info: b"" if info.filename.startswith("bee") else PNG for info in infos}
    run(zipped(tmp_path / "x.zip", members), "--output", tmp_path / "out")
    assert listed(tmp_path / "out")[0] == ["bee", "cat", "dog"]


def test_a_third_split_is_named_and_not_packed(images, tmp_path, capsys):
    for split in NAMES:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / split).symlink_to(images / split)
    tree(tmp_path / "in", {"test/a/1.png": PNG})
    run(tmp_path / "in", "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert "not packed: test in" in capsys.readouterr().err


# Other sources. Each function writes the training split in one form and returns what to pack.


def as_zip(images, folder):
    with zipfile.ZipFile(folder / "any.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(archives.read_folder(images / "train").items()):
            archive.writestr(f"./data/train/{name}", data)
        archive.writestr("data/train/", "")
        archive.writestr("__MACOSX/data/train/a/._1.png", "")
    return [folder / "any.zip"]


def as_compressed(ending):
    def write(images, folder):
        path = folder / f"train.{ending}"
        mode = {"tgz": "gz"}.get(ending, ending.rpartition(".")[2])
        archives.write(folder / "train.tar", archives.read_folder(images / "train"), format=tarfile.GNU_FORMAT)
        with tarfile.open(path, f"w:{mode}") as archive, tarfile.open(folder / "train.tar") as plain:
            for member in plain:
                data = plain.extractfile(member).read()
                member.name = f"train/{member.name}"
                archive.addfile(member, io.BytesIO(data))
        (folder / "train.tar").unlink()
        return [path]

    return write


def as_tars(form):
    def write(images, folder):
        data = archives.pack(images, folder / "data", form)
        return [data / "train.tar"] if form == "one" else [data / "train"]

    return write


def as_files_of_a_folder(images, folder):
    return sorted((archives.pack(images, folder / "data", "shards") / "train").glob("*.tar"))


def as_parquets(images, folder):
    """Write files whose rows are in another order than the names of the classes, with each image's name."""
    pytest.importorskip("pyarrow")
    files = archives.read_folder(images / "train")
    names = sorted({name.partition("/")[0] for name in files}, reverse=True)
    order = sorted(files, key=lambda name: name[::-1])
    for number in range(3):
        chosen = order[number::3]
        rows = [(files[name], name.rpartition("/")[2]) for name in chosen]
        labels = [names.index(name.partition("/")[0]) for name in chosen]
        write_parquet(folder / f"data/train-{number:05d}-of-00003.parquet", rows, labels, names)
    return [folder / "data"]


FORMS = {
    "zip": as_zip,
    **{ending: as_compressed(ending) for ending in ("tar.gz", "tgz", "tar.bz2", "tar.xz")},
    **{f"archives: {form}": as_tars(form) for form in archives.FORMS},
    "files": as_files_of_a_folder,
    "parquet": as_parquets,
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_lists_what_the_folder_lists(form, images, tmp_path):
    sources = FORMS[form](images, tmp_path)
    words = (*sources, "--output", tmp_path / "out", "--shard_size", SMALL)
    run(*words)
    assert listed(tmp_path / "out") == listed(images / "train")
    before, whole = times(tmp_path / "out"), contents(tmp_path / "out")
    run(*words)
    assert times(tmp_path / "out") == before

    # A run that goes on writes the same, though it begins to read in the middle.
    for number in (1, 3):
        (tmp_path / f"out/shard-{number:05d}.tar").unlink()
    run(*words)
    assert contents(tmp_path / "out") == whole


def test_folders_zips_and_archives_give_the_same_shards(images, packed, tmp_path):
    for form in ("zip", "files", "archives: webdataset"):
        (tmp_path / form).mkdir()
        run(*FORMS[form](images, tmp_path / form), "--output", tmp_path / form / "out", "--shard_size", SMALL)
        assert contents(tmp_path / form / "out") == contents(packed)


PREFIXES = {  # names in the archive set.zip or set.tar.gz, and what the shards list
    "the archive's name": (["set/a/1.png", "set/b/1.png"], ["a/1.png", "b/1.png"]),
    "the archive's name, which is a class": (["set/1.png", "set/2.png"], ["set/1.png", "set/2.png"]),
    "the split within the archive's name": (["set/val/a/1.png", "set/val/b/1.png"], ["a/1.png", "b/1.png"]),
    "a split of flat images": (["train/1.png", "train/2.png"], ["images/1.png", "images/2.png"]),
    "no common folder": (["set/a/1.png", "b/1.png"], ["b/1.png", "set/a/1.png"]),
    "flat": (["1.png", "2.png"], ["images/1.png", "images/2.png"]),
}


@pytest.mark.parametrize("form", ["zip", "tar.gz", "tar"])
@pytest.mark.parametrize("case", PREFIXES)
def test_leading_folders_are_dropped(case, form, tmp_path):
    names, expected = PREFIXES[case]
    write = {"zip": zipped, "tar.gz": gzipped, "tar": archives.write}[form]
    run(write(tmp_path / f"set.{form}", dict.fromkeys(names, PNG)), "--output", tmp_path / "out")
    assert [name for name, *_ in listed(tmp_path / "out")[1]] == expected


@pytest.mark.parametrize("file", ["x.tar", "x.zip", "x"])
@pytest.mark.parametrize("name", ["PK/1.png", "BZh/1.png", "PAR1/1.png"])
def test_a_tar_is_one_whatever_it_begins_with_and_is_called(name, file, tmp_path):
    run(archives.write(tmp_path / file, {name: PNG, "a/1.png": PNG}), "--output", tmp_path / "out")
    assert sorted(["a/1.png", name]) == sorted(found for found, *_ in listed(tmp_path / "out")[1])


def test_empty_classes_and_other_files_of_archives(tmp_path, capsys):
    members = {"a/1.png": PNG, "empty/": b"", "a/x.txt": b"", "README": b"", ".x/1.png": PNG, "__MACOSX/": b""}
    zipped(tmp_path / "1.zip", members)
    gzipped(tmp_path / "1.tgz", members)
    for name in ("1.zip", "1.tgz"):
        run(tmp_path / name, "--output", tmp_path / name[2:])
        assert listed(tmp_path / name[2:]) == (["a", "empty"], [("a/1.png", 0, PNG)])
        assert "left out: 2 files of other kinds (" in capsys.readouterr().err
    del members["__MACOSX/"]  # folders of this name are found in zips only
    run(archives.write(tmp_path / "1.tar", members), "--output", tmp_path / "tar")
    assert listed(tmp_path / "tar") == (["a", "empty"], [("a/1.png", 0, PNG)])


def test_several_zips_may_share_classes_or_be_classes(tmp_path):
    for name in ("cat", "dog"):
        zipped(tmp_path / f"{name}.zip", {f"{name}{number}.png": PNG for number in range(2)})
        zipped(tmp_path / f"part-{name}.zip", {f"part-{name}/a/{name}.png": PNG, f"part-{name}/b/1{name}.png": PNG})
    run(tmp_path / "cat.zip", tmp_path / "dog.zip", "--output", tmp_path / "classes")
    assert [name for name, *_ in listed(tmp_path / "classes")[1]][1:3] == ["cat/cat1.png", "dog/dog0.png"]
    run(*tmp_path.glob("part-*"), "--output", tmp_path / "parts")
    assert [name for name, *_ in listed(tmp_path / "parts")[1]] == [
        "a/cat.png",
        "a/dog.png",
        "b/1cat.png",
        "b/1dog.png",
    ]


def test_samples_of_one_name_in_several_webdataset_shards(tmp_path, capsys):
    for number in range(2):
        members = {"0.png": png(number), "0.cls": b"11", "1.png": png(5), "1.cls": b"%d" % (2 + number)}
        archives.write(tmp_path / f"in/{number}.tar", members)
    run(tmp_path / "in", "--output", tmp_path / "out")
    classes, found = listed(tmp_path / "out")
    assert classes == sorted(f"class_{number}" for number in range(12))
    assert [name for name, *_ in found] == ["class_11/0/0.png", "class_11/1/0.png", "class_2/1.png", "class_3/1.png"]
    assert [content for *_, content in found[:2]] == [png(0), png(1)]
    assert "classes are numbered in the order of their names from now on" in capsys.readouterr().err


# Indexes of existing archives.


def test_index_writes_what_is_missing_or_outdated(images, tmp_path, capsys):
    folder = archives.pack(images, tmp_path / "data", "shards") / "train"
    first, second, *_ = sorted(folder.glob("*.tar"))
    run("--index", first, second)
    before = times(folder)
    assert len([name for name in before if name.endswith(".index")]) == 2
    run("--index", folder)
    assert {name: time for name, time in times(folder).items() if name in before} == before
    assert capsys.readouterr().out.splitlines() == [
        "2 indexes written, 0 current already",
        "6 indexes written, 2 current already",
    ]
    assert listed(folder) == listed(images / "train")

    # An archive that was touched, or has grown, is not the one that the index is of.
    os.utime(first, ns=(0, 0))
    with tarfile.open(second, "a") as archive:
        archives.add(archive, "a/new.png", PNG)
    assert not archive_index.has_current_index(first) and not archive_index.has_current_index(second)
    assert "a/new.png" in archive_index.load_index(second).names
    run("--index", folder)
    assert capsys.readouterr().out == "2 indexes written, 6 current already\n"
    assert archive_index.has_current_index(second) and "a/new.png" in archive_index.load_index(second).names


def test_an_index_that_is_believed_is_not_read_from_the_headers(tmp_path):
    """Else the tests above would prove nothing: damage that only the headers show goes unnoticed."""
    archive = archives.write(tmp_path / "train.tar", {f"a/{number}.png": PNG for number in range(3)})
    run("--index", archive)
    status = archive.stat()
    with archive.open("r+b") as file:
        file.seek(1024)  # the second member's header
        file.write(b"damage")
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(archive_index.load_index(archive).names) == 3
    Path(f"{archive}.index").unlink()
    with pytest.raises(UserError, match="damaged"):
        archive_index.load_index(archive)


def test_an_index_lies_beside_a_link(images, tmp_path):
    target = archives.pack(images, tmp_path / "data", "one") / "train.tar"
    (tmp_path / "links").mkdir()
    (tmp_path / "links/train.tar").symlink_to(target)
    run("--index", tmp_path / "links/train.tar")
    assert archive_index.has_current_index(tmp_path / "links/train.tar") and not Path(f"{target}.index").exists()

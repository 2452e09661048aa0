"""scripts/pack.py: what it refuses before anything is written, and what goes wrong while shards are written."""

import bz2
import os
import re
import resource
import shutil
import sys
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager

import archives
import pytest
from archives import PNG
from packs import SMALL, a_zip, contents, gzipped, listed, run, times, tree, write_parquet, zipped

from scripts import pack
from util.packing import shards, writing

# What is refused, before anything is written.


def other_size(folder):
    with tarfile.open(folder / "shard-00001.tar", "w") as archive:
        archives.add(archive, "a/1.png", PNG)


def grown(folder):
    with (folder / "shard-00001.tar").open("ab") as file:
        file.write(bytes(10240))


LEFTOVERS = {
    "shards beyond the last": lambda folder: shutil.copy(folder / "shard-00000.tar", folder / "shard-00006.tar"),
    "another archive": lambda folder: archives.write(folder / "x.TAR", {"a/1.png": PNG}),
    "an archive that can't be read in place": lambda folder: zipped(folder / "x.zip", {"a/1.png": PNG}),
    "a folder": lambda folder: (folder / "cat").mkdir(),
    "an image": lambda folder: (folder / "1.png").write_bytes(PNG),
    "other images": other_size,
    "more bytes": grown,
    "a cut shard": lambda folder: os.truncate(folder / "shard-00001.tar", 3000),
    "a shard with other classes": lambda folder: shutil.copy(
        archives.write(folder.parent / "0.tar", {"z/": b""}), folder / "shard-00001.tar"
    ),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_what_does_not_belong_is_refused_and_nothing_is_written(case, images, packed, tmp_path, refusal):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "shard-00003.tar").unlink()
    LEFTOVERS[case](folder)
    before = times(folder)
    message = refusal(lambda: run(images / "train", "--output", folder, "--shard_size", SMALL))
    assert ("remove it" if case == "a cut shard" else "remove what is there") in message
    assert times(folder) == before


def test_shards_of_other_classes_are_refused(tmp_path, refusal):
    """Also where the classes differ only by one that has no images."""
    source = tree(tmp_path / "in", {"a/1.png": PNG, "b": None})
    run(source, "--output", tmp_path / "out")
    (source / "b").rmdir()
    assert "holds shard-00000.tar" in refusal(lambda: run(source, "--output", tmp_path / "out"))


def test_shards_of_another_size_are_refused(images, packed, tmp_path, refusal):
    folder = shutil.copytree(packed, tmp_path / "copy")
    for size in (SMALL * 2, "1G"):
        message = refusal(lambda size=size: run(images / "train", "--output", folder, "--shard_size", size))
        assert "shard-00000.tar" in message and "--shard_size" in message
    assert contents(folder) == contents(packed)


def damaged_zip(folder):
    path = zipped(folder / "x.zip", {"a/1.png": PNG, "a/2.png": PNG})
    path.write_bytes(path.read_bytes().replace(PNG, PNG[:-1] + b"x", 1))
    return path


def cut(path, share=0.6):
    os.truncate(path, int(path.stat().st_size * share))
    return path


def encrypted_zip(folder):
    """Set the flags that say so, in the member's own header and in the directory."""
    path = zipped(folder / "x.zip", {"a/1.png": PNG})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def zip_of_unknown_kind(folder):
    path = zipped(folder / "x.zip", {"a/1.png": PNG})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(data)
    return path


def zip_with_a_link(folder):
    info = zipfile.ZipInfo("a/1.png")
    info.external_attr = 0o120777 << 16
    return zipped(folder / "x.zip", {info: "2.png"})


def twice_in_a_zip(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/1.png", PNG)
        archive.writestr("a/1.png", PNG)
    return folder / "x.zip"


def tar_with_a_damaged_header(folder):
    """Compress it after the damage, so that no checksum of the whole tells."""
    path = archives.write(folder / "x.tar", {f"a/{number}.png": PNG for number in range(3)})
    data = bytearray(path.read_bytes())
    data[1024] ^= 1
    (folder / "x.tar.bz2").write_bytes(bz2.compress(data))
    return folder / "x.tar.bz2"


def joined_tars(folder):
    data = archives.write(folder / "x.tar", {"a/1.png": PNG}).read_bytes()
    (folder / "x.tar.bz2").write_bytes(bz2.compress(data + data))
    return folder / "x.tar.bz2"


def bad_checksum(folder):
    path = gzipped(folder / "x.tgz", {"a/1.png": PNG})
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    return path


def written(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


def both(*functions):
    return lambda folder: [function(folder) for function in functions]


def a_tgz(*names, **header):
    return lambda folder: gzipped(folder / "x.tgz", dict.fromkeys(names, PNG), **header)


def a_tar(*names, **header):
    def write(folder):
        with tarfile.open(folder / "x.tar", "w") as archive:
            for name in names:
                archives.add(archive, name, PNG, **header)
        return folder / "x.tar"

    return write


def a_tree(*names):
    return lambda folder: tree(folder / "in", dict.fromkeys(names, PNG))


LINK = {"type": tarfile.SYMTYPE, "linkname": "2.png", "size": 0}

SOURCES = {  # what is written and named, and the message
    "missing": (lambda folder: folder / "nowhere", "no such file or folder: .*nowhere"),
    "empty folder": (lambda folder: tree(folder, {"in": None}) / "in", "no class folders"),
    "folder without images": (
        lambda folder: tree(folder / "in", {"a/1.txt": b""}),
        r"no images in .*\(.txt 1\).*end in",
    ),
    "folder of zips": (
        lambda folder: a_zip("a/1.png")(tree(folder, {"in": None}) / "in").parent,
        "python scripts/pack",
    ),
    "training and testing": (a_tree("training/a/1.png", "testing/a/1.png"), r"several splits \(testing, training\)"),
    "train and test": (a_tree("train/a/1.png", "test/a/1.png"), r"several splits \(test, train\)"),
    "a split or a class": (
        a_tree("train/steam/1.png", "car/1.png"),
        r"holds train beside folders of images \(car\): pack .*in/train by itself, or rename it",
    ),
    "split as a class": (a_tree("a/train/1.png", "a/train/2.png"), "all images lie in a/train/.*rename it"),
    "broken link": (lambda folder: tree(folder, {"in/a": None}) / "in", "no images in"),
    "text": (written("x.txt", b"text"), "x.txt is no archive that can be read"),
    "empty tar": (written("x.tar", b""), "is an empty file"),
    "no zip": (written("x.zip", b"text" * 200), "x.zip is no tar archive"),
    "zst": (written("x.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600)), "unzstd it"),
    "two folders": (both(a_tree("a/1.png"), lambda folder: tree(folder / "on", {"a/1.png": PNG})), "can't be packed t"),
    "two kinds": (both(a_zip("a/1.png"), a_tgz("a/2.png")), "can't be packed together: name one folder, or archives"),
    "link in a tar": (a_tar("a/1.png", **LINK), "a/1.png is a link"),
    "link in a tgz": (a_tgz("a/1.png", **LINK), "x.tgz/a/1.png is a link.*: unpack the archive"),
    "link in a zip": (zip_with_a_link, "x.zip/a/1.png is a link.*: unpack the archive"),
    "encrypted zip": (encrypted_zip, "x.zip/a/1.png is encrypted: unpack the archive"),
    "unknown compression": (zip_of_unknown_kind, "x.zip can't be read .*: unpack it"),
    "damaged zip": (damaged_zip, r"x.zip is damaged or cut off \(Bad CRC-32 for file 'a/1.png'\): copy or download"),
    "cut zip": (lambda folder: cut(a_zip("a/1.png", "a/2.png")(folder)), "x.zip is damaged or cut off"),
    "cut tgz": (lambda folder: cut(a_tgz("a/1.png", "a/2.png")(folder)), "x.tgz is damaged or cut off"),
    "bad checksum": (bad_checksum, r"x.tgz is damaged or cut off \(CRC"),
    "damaged header": (tar_with_a_damaged_header, r"x.tar.bz2 is damaged or cut off \(bad checksum\)"),
    "joined tars": (joined_tars, "goes on after its end mark"),
    ".. in a zip": (a_zip("a/1.png", "../b/1.png"), r"a member named \.\./b/1.png, outside of any folder"),
    ".. in a tgz": (a_tgz("a/1.png", "a/../../1.png"), "outside of any folder"),
    ".. in a tar": (a_tar("../a/1.png"), "outside of any folder"),
    "one name twice in a zip": (twice_in_a_zip, "two images have one name, a/1.png"),
    "one name twice in a tgz": (a_tgz("a/1.png", "./a/1.png"), "two images have one name, a/1.png"),
    "one name in two zips": (both(a_zip("a/1.png"), a_zip("a/1.png", name="y.zip")), "two images have one name"),
    "loose images": (
        a_tree("1.png", "cat/2.png"),
        r"in holds images \(1.png\) beside folders of images: move them into",
    ),
    "some in folders": (a_zip("a/1.png", "2.png"), r"in folders \(a/1.png\) and some are not \(2.png\)"),
    "several splits in a zip": (a_zip("train/a/1.png", "val/a/1.png"), r"several splits \(train, val\)"),
    "splits in a folder of a zip": (a_zip("x/train/a/1.png", "x/val/a/1.png", name="y.zip"), r"several splits \(tra"),
    "missing, of a long name": (lambda folder: folder / ("x" * 300), "no such file or folder"),
    "several splits in a tar": (a_tar("x/train/a/1.png", "x/val/a/1.png"), r"several splits \(train, val\)"),
    "hidden class": (
        lambda folder: archives.write(folder / "x.tar", {"0.png": PNG, "0.cls": b".x"}),
        "'.x/0.png' would",
    ),
    "labels beside images in folders": (
        lambda folder: archives.write(folder / "x.tar", {"a/0.png": PNG, "b/1.png": PNG, "b/1.json": b'{"label": 1}'}),
        "b/1.json is the label of an image in a folder",
    ),
    "labels in folders of a zip": (
        a_zip("a/0.png", "b/1.png", "b/1.cls"),
        r"labels beside them \(b/1.cls\).*decompress",
    ),
    "webdataset in a tgz": (a_tgz("0.png", "0.cls"), r"labels beside them \(0.cls\).*decompress"),
    "no images in a zip": (a_zip("a/1.txt"), "no images in .*x.zip. left out: 1 file of other kinds"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_are_refused(case, tmp_path, refusal):
    write, expected = SOURCES[case]
    sources = write(tmp_path)
    sources = sources if isinstance(sources, list) else [sources]
    message = refusal(lambda: run(*sources, "--output", tmp_path / "out"))
    assert message.startswith("error: ") and message.count("\n") <= 2
    assert re.search(expected, message), message
    assert not times(tmp_path / "out")


def damaged_parquet(folder):
    path = write_parquet(folder / "x.parquet", [(PNG * 9, "1.png")], [0], ["a"])
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT")] ^= 255
    path.write_bytes(data)
    return path


def a_parquet(*args, name="x.parquet", **more):
    return lambda folder: write_parquet(folder / name, *args, **more)


ROW = (PNG, "1.png")

PARQUETS = {
    "splits": (
        both(*(a_parquet([ROW], name=f"{word}-0.parquet") for word in ("train", "test"))),
        "several splits .*te",
    ),
    "splits at the end": (
        both(*(a_parquet([ROW], name=f"mnist-{word}.parquet") for word in ("train", "test"))),
        "several splits .*test",
    ),
    "splits in a folder": (
        lambda folder: (
            [a_parquet([ROW], name=f"in/{word}-0.parquet")(folder) for word in ("train", "validation")][:0]
            or folder / "in"
        ),
        r"several splits \(.*in/train-0.parquet, .*in/validation-0.parquet\): pack those of one at a time",
    ),
    "splits by their folders": (
        both(*(a_parquet([ROW], name=f"{word}/0.parquet") for word in ("train", "val"))),
        "sev",
    ),
    "other classes": (
        both(a_parquet([ROW], [0], ["a"]), a_parquet([ROW], [0], ["b"], name="y.parquet")),
        "other columns",
    ),
    "no images": (a_parquet([]), "no images in .*x.parquet"),
    "no image column": (lambda folder: _other_table(folder, {"x": [1]}), "has no columns of images"),
    "two image columns": (lambda folder: _two_images(folder), "has 2 columns of images"),
    "paths alone": (a_parquet([(None, "x/1.png")]), r"row 0, has only the path of an image \(x/1.png\)"),
    "label out of range": (a_parquet([ROW, (PNG, "2.png")], [0, 1], ["a"]), "row 1, has 1 as its label"),
    "negative label": (a_parquet([ROW, ROW], [0, -1]), "row 1, has -1 as its label"),
    "missing label": (a_parquet([ROW, ROW], ["a", None]), "row 1, has None as its label"),
    "label of numbers and points": (a_parquet([ROW], [0.5]), "has 0.5 as its label"),
    "class ..": (a_parquet([ROW], [".."]), r"a class named '\.\.', which can't be a folder's name"),
    "class without name": (a_parquet([ROW], [0], [""]), "a class named ''"),
    "classes of one name": (a_parquet([ROW], [0], ["a/b", "a_b"]), "two classes named 'a_b'"),
    "damaged": (damaged_parquet, "x.parquet"),
    "cut": (lambda folder: cut(a_parquet([ROW], [0])(folder)), "x.parquet is damaged or cut off"),
}


def _other_table(folder, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


def _two_images(folder):
    pair = [{"bytes": PNG, "path": None}]
    return _other_table(folder, {"x": pair, "y": pair})


@pytest.mark.parametrize("case", PARQUETS)
def test_parquet_files_that_are_refused(case, arrow, tmp_path, refusal):
    write, expected = PARQUETS[case]
    sources = write(tmp_path)
    message = refusal(lambda: run(*(sources if isinstance(sources, list) else [sources]), "--output", tmp_path / "out"))
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch, refusal):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(lambda: run(tmp_path / "x.parquet", "--output", tmp_path / "out"))
    assert "which pyarrow reads: pip install pyarrow" in message


WORDS = {
    "no output": ((), "give --output DIR"),
    "output and index": (("--output", "{}/out", "--index"), "give --output DIR"),
    "no size": (("--output", "{}/out", "--shard_size", "big"), "big is no size"),
    "size 0": (("--output", "{}/out", "--shard_size", "0G"), "0G is no size"),
    "output in the source": (("--output", "{}/in/a/out"), "lie in each other"),
    "output around the source": (("--output", "{}"), "lie in each other"),
    "output is a file": (("--output", "{}/in/a/1.png/out"), "in/a/1.png is a file"),
    "index of a folder of images": (("--index",), "in holds no archives"),
}


@pytest.mark.parametrize("case", WORDS)
def test_flags_that_are_refused(case, tmp_path, refusal):
    words, expected = WORDS[case]
    source = tree(tmp_path / "in", {"a/1.png": PNG})
    assert expected in refusal(lambda: run(source, *(word.format(tmp_path) for word in words)))


@pytest.mark.parametrize(("text", "size"), [("500M", 500 << 20), ("1g", 1 << 30), ("2T", 2 << 40), ("4096", 4096)])
def test_sizes_of_shards(text, size):
    assert pack.parse_size(text) == size


# What goes wrong while shards are written.


def test_a_shard_that_reads_back_differently_is_named_and_gets_no_name(images, tmp_path, monkeypatch, refusal):
    sync = os.fsync

    def spoil(descriptor):
        sync(descriptor)
        if os.fstat(descriptor).st_size == SMALL:
            os.pwrite(descriptor, b"?", 700)  # within the first image

    monkeypatch.setattr(os, "fsync", spoil)
    message = refusal(lambda: run(images / "train", "--output", tmp_path / "out", "--shard_size", SMALL))
    assert "shard-00000.tar/ankle_boot/00000.png reads back differently" in message and "check the disk" in message
    assert not contents(tmp_path / "out") and not list((tmp_path / "out").glob(".unf*"))


def test_a_header_that_reads_back_differently_is_an_error(images, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"?", 3))
    message = refusal(lambda: run(images / "train", "--output", tmp_path / "out"))
    assert "shard-00000.tar can't be read back" in message and not contents(tmp_path / "out")


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_source_that_changes_is_an_error(change, tmp_path, monkeypatch, refusal):
    source = tree(tmp_path / "in", {"a/1.png": PNG, "a/2.png": PNG})
    plan = shards.plan_shards

    def disturb(*args):
        path = source / "a/2.png"
        path.write_bytes(PNG + b"more") if change == "grown" else path.unlink()
        return plan(*args)

    monkeypatch.setattr(writing, "plan_shards", disturb)
    message = refusal(lambda: run(source, "--output", tmp_path / "out"))
    assert ("a/2.png has" if change == "grown" else "cannot read") in message and "a/2.png" in message
    assert not contents(tmp_path / "out")


@contextmanager
def full_disk(limit):
    """Let no file grow beyond a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(images, tmp_path, refusal):
    with full_disk(30000):
        message = refusal(lambda: run(images / "train", "--output", tmp_path / "out"))
    assert message.startswith("error: cannot write") and "shard-00000.tar: File too large. Make room" in message
    assert not times(tmp_path / "out")
    run(images / "train", "--output", tmp_path / "out")
    assert listed(tmp_path / "out") == listed(images / "train")


def denied(*_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("words", [("--output", "/proc/out"), ("--index",)])
def test_a_place_that_cannot_be_written_to_is_named(words, tmp_path, refusal, monkeypatch):
    archive = archives.write(tmp_path / "x.tar", {"a/1.png": PNG})
    if words == ("--index",):
        monkeypatch.setattr(os, "replace", denied)
    message = refusal(lambda: run(archive, *words))
    assert ("x.tar.index: Permission denied" if words == ("--index",) else "/proc") in message


@pytest.mark.parametrize("form", ["folder", "zip", "tgz"])
def test_the_images_are_never_in_memory_together(form, tmp_path):
    """12 images of a megabyte, all in one shard, take a few megabytes."""
    members = {f"a/{number}.png": os.urandom(1 << 20) for number in range(12)}
    write = {"folder": lambda path, members: tree(path, members), "zip": zipped, "tgz": gzipped}[form]
    source = write(tmp_path / f"x.{form}", members)
    members.clear()
    tracemalloc.start()
    try:
        run(source, "--output", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()

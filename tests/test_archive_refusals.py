"""Archives that are damaged, cut off or of another kind: each ends in one message, and never in other bytes."""

import io
import os
import random
import re
import shutil
import struct
import tarfile

import archives
import pytest
from archives import PNG, good, listed, opened, png, raw, sample
from runs import job_argv

import main_pretrain
from util.data import datasets, tar
from util.errors import UserError

# Bad archives.


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

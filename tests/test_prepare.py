"""scripts/prepare_imagenet.py: every image gets to its class, archives are checked, and nothing is done twice."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import pytest
from archives import add
from packs import listed

from util.data.archive_index import has_current_index
from util.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import prepare_imagenet

LABELS = ["n00000002", "n00000001", "n00000003"] * 2


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Small stand-ins for ImageNet's files, with three classes of two images."""
    monkeypatch.setattr(prepare_imagenet, "CLASSES", 3)
    monkeypatch.setattr(prepare_imagenet, "PER_CLASS", 2)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in range(1, 7):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", b"%d" % number * number)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in sorted(set(LABELS)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                folder = tarfile.TarInfo(name)
                folder.type = tarfile.DIRTYPE
                part.addfile(folder)
                add(part, f"{name}_1.JPEG", name.encode())
                add(part, "notes.txt", b"no image")
            add(tar, f"{name}.tar", inner.getvalue())
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    rows = [f"ILSVRC2012_val_{n:08d},{label} 1 2 3 4" for n, label in reversed(list(enumerate(LABELS, 1)))]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    return tmp_path


def prepare(where, labels="labels.txt", val="val.tar", *more):
    words = ["--output", where / "out", "--val", where / val, "--labels", where / labels, *more]
    prepare_imagenet.main(list(map(str, words)))


@pytest.mark.parametrize("labels", ["labels.txt", "LOC_val_solution.csv"])
def test_validation_images_go_to_their_classes(archives, labels, capsys):
    prepare(archives, labels, "val.tar", "--train", archives / "train.tar")
    for number, label in enumerate(LABELS, 1):
        file = archives / "out/val" / label / f"ILSVRC2012_val_{number:08d}.JPEG"
        assert file.read_bytes() == b"%d" % number * number
    assert (archives / "out/train/n00000003/n00000003_1.JPEG").read_bytes() == b"n00000003"
    assert "2 images of each of 3 classes, 6 written now" in capsys.readouterr().out


def test_the_development_kits_classes_are_read(archives):
    scipy_io = pytest.importorskip("scipy.io")
    np = pytest.importorskip("numpy")
    synsets = np.array(
        [(n, name) for n, name in enumerate(sorted(set(LABELS)), 1)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
    )
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    with tarfile.open(archives / "devkit.tar.gz", "w:gz") as tar:
        add(tar, "kit/data/meta.mat", meta.getvalue())
        add(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n3\n2\n1\n3\n")
    assert prepare_imagenet.read_labels(archives / "devkit.tar.gz") == LABELS


def test_a_second_run_writes_nothing_and_a_cut_off_one_goes_on(archives, capsys):
    prepare(archives)
    file = archives / "out/val/n00000002/ILSVRC2012_val_00000004.JPEG"
    file.write_bytes(b"4")  # as if the script had been killed while writing it
    prepare(archives)
    prepare(archives)
    assert file.read_bytes() == b"4444"
    assert [line.split()[-3] for line in capsys.readouterr().out.splitlines()] == ["6", "1", "0"]


def test_a_flat_folder_will_do(archives):
    with tarfile.open(archives / "val.tar") as tar:
        tar.extractall(archives / "flat", filter="data")
    prepare(archives, val="flat")
    assert (archives / "out/val/n00000001/ILSVRC2012_val_00000005.JPEG").read_bytes() == b"55555"


def test_folders_and_other_files_in_a_class_are_no_images(archives):
    prepare(archives, "labels.txt", "val.tar", "--train", archives / "train.tar")
    names = sorted(path.name for path in (archives / "out/train").rglob("*") if path.is_file())
    assert names == [f"{name}_1.JPEG" for name in sorted(set(LABELS))]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_names_may_begin_with_the_folder_that_was_packed(packed, archives, small_shards):
    """As `tar cf n00000001.tar .` writes them."""
    with tarfile.open(archives / "train.tar", "w") as tar:
        for name in sorted(set(LABELS)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                add(part, f"./{name}_1.JPEG", b"1")
                add(part, f"./._{name}_1.JPEG", b"hidden")
            add(tar, f"{name}.tar", inner.getvalue())
    prepare_imagenet.main(
        ["--output", str(archives / "out"), "--train", str(archives / "train.tar"), *(["--packed"] if packed else [])]
    )
    expected = [(f"{name}/{name}_1.JPEG", number, b"1") for number, name in enumerate(sorted(set(LABELS)))]
    assert listed(archives / "out/train")[1] == expected


def test_a_damaged_development_kit_is_a_message(archives, refusal):
    data = bytearray(gzip.compress(bytes(range(256)) * 400))
    data[30] ^= 255
    (archives / "devkit.tar.gz").write_bytes(data)
    assert "devkit.tar.gz cannot be read" in refusal(lambda: prepare(archives, "devkit.tar.gz"))


@pytest.mark.parametrize("spoil", ["missing image", "wrong labels", "cut archive", "strange folder", "no labels"])
def test_what_is_not_whole_is_refused(archives, spoil):
    if spoil == "missing image":
        with tarfile.open(archives / "val.tar") as tar:
            tar.extractall(archives / "flat", filter="data")
        (archives / "flat/ILSVRC2012_val_00000003.JPEG").unlink()
    elif spoil == "wrong labels":
        (archives / "labels.txt").write_text("\n".join(["tench", *LABELS[1:]]))
    elif spoil == "cut archive":
        (archives / "val.tar").write_bytes((archives / "val.tar").read_bytes()[:700])
    elif spoil == "strange folder":
        (archives / "out/val/extra").mkdir(parents=True)
    else:
        (archives / "labels.txt").unlink()
    with pytest.raises(UserError):
        prepare(archives, val="flat" if spoil == "missing image" else "val.tar")


# Packed: the same images in shards.


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/shard-*")}


def prepare_packed(where, *more, out="packed", val="val.tar"):
    words = ["--packed", "--output", where / out, "--val", where / val, "--labels", where / "labels.txt"]
    prepare_imagenet.main(list(map(str, [*words, "--train", where / "train.tar", *more])))


@pytest.fixture
def small_shards(monkeypatch):
    """Shards that hold at most three or four of the images."""
    monkeypatch.setattr(prepare_imagenet, "SHARD_SIZE", 5120)
    monkeypatch.setattr(tarfile, "RECORDSIZE", 512)


@pytest.mark.parametrize("val", ["val.tar", "flat"])
def test_packed_lists_what_the_folders_list(val, archives, small_shards, capsys):
    with tarfile.open(archives / "val.tar") as tar:
        tar.extractall(archives / "flat", filter="data")
    prepare(archives, "labels.txt", "val.tar", "--train", archives / "train.tar")
    prepare_packed(archives, val=val)
    for split, count in (("train", 3), ("val", 6)):
        assert listed(archives / "packed" / split, split) == listed(archives / "out" / split, split)
        assert len(listed(archives / "out" / split, split)[1]) == count
    shards = sorted((archives / "packed/val").glob("*.tar"))
    assert [path.name for path in shards] == ["shard-00000.tar", "shard-00001.tar"]
    assert all(has_current_index(path) for path in shards)
    assert not [path for path in (archives / "packed").rglob("*") if path.suffix == ".JPEG"]
    printed = capsys.readouterr().out
    assert "val: 6 images of 3 classes, 2 shards, " in printed and "train: 3 images of 3 classes, 1 shard, " in printed


def test_packed_a_second_run_writes_nothing_and_a_cut_off_one_goes_on(archives, small_shards, capsys):
    prepare_packed(archives)
    before = times(archives / "packed")
    prepare_packed(archives)
    assert times(archives / "packed") == before
    whole = (archives / "packed/val/shard-00001.tar").read_bytes()
    (archives / "packed/val/shard-00001.tar").unlink()
    (archives / "packed/val/.unfinished-1.tar").write_bytes(b"cut off")
    prepare_packed(archives)
    assert (archives / "packed/val/shard-00001.tar").read_bytes() == whole
    after = times(archives / "packed")
    assert [path.name for path in before if before[path] != after[path]] == ["shard-00001.tar", "shard-00001.tar.index"]
    assert not list((archives / "packed").rglob(".unfinished*"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("; ")[2] for line in lines[::2]] == [
        "2 shards written now",
        "nothing to write",
        "1 shard written now",
    ]


def test_shards_and_folders_are_not_mixed(archives):
    prepare(archives, "labels.txt", "val.tar", "--train", archives / "train.tar")
    with pytest.raises(UserError, match="out/val holds n00000001, n00000002, n00000003"):
        prepare_packed(archives, out="out")
    prepare_packed(archives)
    (archives / "packed").rename(archives / "again")
    (archives / "out").rename(archives / "folders")
    (archives / "again").rename(archives / "out")
    with pytest.raises(UserError, match="out/val holds archives: .*add --packed"):
        prepare(archives)


def compressed(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def damaged_inside(path):
    """Damage the header of the second image in the last class's archive, which tarfile takes for the archive's end."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as part:
        add(part, "n00000003_1.JPEG", b"1")
        add(part, "n00000003_2.JPEG", b"2")
    data = bytearray(inner.getvalue())
    data[1024] ^= 1
    with tarfile.open(path, "w") as tar:
        for name in sorted(set(LABELS)):
            add(tar, f"{name}.tar", bytes(data))


def with_a_stranger(path):
    with tarfile.open(path, "a") as tar:
        add(tar, "images.tar", b"")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-20000])


def of_two_classes(path):
    with tarfile.open(path) as tar:
        archives = {member.name: tar.extractfile(member).read() for member in tar.getmembers()[:2]}
    with tarfile.open(path, "w") as tar:
        for name, data in archives.items():
            add(tar, name, data)


def of_empty_classes(path):
    with tarfile.open(path, "w") as tar:
        for name in sorted(set(LABELS)):
            add(tar, f"{name}.tar", bytes(10240))


SPOILT = {  # file, what happens to it, the message, and whether it is one of the unpacked way as well
    "val cut off": ("val.tar", lambda path: path.write_bytes(path.read_bytes()[:1100]), "cut off", False),
    "val compressed": ("val.tar", compressed, "compressed: gunzip it", False),
    "val incomplete": ("flat/ILSVRC2012_val_00000003.JPEG", Path.unlink, "must hold 2 images of each", True),
    "train is a folder": ("train.tar", lambda path: (path.unlink(), path.mkdir()), "is a folder: name a file", True),
    "labels of another kind": (
        "labels.txt",
        lambda path: path.write_bytes(b"\xff\xfe"),
        "labels.txt cannot be r",
        True,
    ),
    "labels": ("labels.txt", lambda path: path.write_text("tench\n" * 6), "--labels must name 2 images", True),
    "no labels": ("labels.txt", Path.unlink, "no such file", True),
    "train cut off": ("train.tar", cut_off, "Is the file complete", True),
    "train of two classes": ("train.tar", of_two_classes, "holds 2 classes instead of 3", True),
    "train of empty classes": ("train.tar", of_empty_classes, "holds no images of n00000001", True),
    "train with another archive": ("train.tar", with_a_stranger, "holds images.tar instead of archives like", True),
    "train damaged inside": ("train.tar", damaged_inside, "bad checksum", True),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_what_is_not_whole_is_named(case, packed, archives, refusal):
    file, spoil, expected, both = SPOILT[case]
    with tarfile.open(archives / "val.tar") as tar:
        tar.extractall(archives / "flat", filter="data")
    spoil(archives / file)
    val = "flat" if file.startswith("flat") else "val.tar"
    if packed:
        assert expected in refusal(lambda: prepare_packed(archives, val=val))
        split = "train" if file == "train.tar" else "val"
        assert not times(archives / "packed") or split == "train" and not list((archives / "packed/train").glob("*"))
    elif both:
        assert expected in refusal(lambda: prepare(archives, "labels.txt", val, "--train", archives / "train.tar"))

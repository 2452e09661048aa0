"""scripts/prepare_imagenet.py: every image gets to its class, archives are checked, and nothing is done twice."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from util.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import prepare_imagenet

LABELS = ["n00000002", "n00000001", "n00000003"] * 2


def add_file(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Small stand-ins for ImageNet's files, with three classes of two images."""
    monkeypatch.setattr(prepare_imagenet, "CLASSES", 3)
    monkeypatch.setattr(prepare_imagenet, "PER_CLASS", 2)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in range(1, 7):
            add_file(tar, f"ILSVRC2012_val_{number:08d}.JPEG", b"%d" % number * number)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in sorted(set(LABELS)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                add_file(part, f"{name}_1.JPEG", name.encode())
            add_file(tar, f"{name}.tar", inner.getvalue())
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
        add_file(tar, "kit/data/meta.mat", meta.getvalue())
        add_file(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n3\n2\n1\n3\n")
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

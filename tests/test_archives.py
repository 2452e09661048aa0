"""Archives: a split in tar archives of any form is the split that its folders are."""

import os
import random
import shutil
import tarfile

import archives
import pytest
from archives import PNG, good, listed, opened, png, raw, sample, save_index

from util import inference
from util.data import datasets
from util.errors import LocalError, UserError

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
    members |= {
        "3/x.png": PNG,
        "3/x.json": b'{"label": 3}',
        "b/x.json": b'{"label": "b"}',
        "c/y.png": PNG,
        "c/y.json": b'{"label": [1, 2]}',
    }
    archives.write(tmp_path / "train.tar", members)
    assert [name for name, *_ in listed(tmp_path)[1]] == ["3/x.png", "a/x.1.png", "a/x.2.png", "b/x.png", "c/y.png"]


@pytest.mark.parametrize(("ending", "label"), [("cls", b"a"), ("json", b'{"label": 3}'), ("json", b'{"cls": "dog"}')])
def test_labels_beside_images_in_folders_matter_for_classes_only(ending, label, tmp_path):
    members = {"a/1.png": PNG, "b/2.png": PNG, f"b/2.{ending}": label}
    archives.write(tmp_path / "train/0.tar", members)
    assert listed(tmp_path, classes_optional=True)[0] == ["a", "b"]
    with pytest.raises(UserError, match=f"b/2.{ending} is the label of an image in a folder, .*without folders"):
        opened(tmp_path)


@pytest.mark.parametrize("label", [b'{"label": [1, 2]}', b'{"label": "a photograph / of"}', b'{"label": -1}'])
def test_pretraining_needs_no_labels_that_are_classes(label, tmp_path):
    archives.write(tmp_path / "train/0.tar", {**sample("1", label, "json"), **sample("2", label, "json")})
    assert listed(tmp_path, classes_optional=True) == ([""], [("1.png", 0, PNG), ("2.png", 0, PNG)])
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
        datasets.refuse_class_mismatch(*splits_, 2)


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
    assert listed(tmp_path, classes_optional=True) == listed(tmp_path / "folder", classes_optional=True)
    archives.write(tmp_path / "val.tar", {"a/1.png": PNG})  # is not one of the training archives
    assert len(listed(tmp_path, classes_optional=True)[1]) == 3
    with pytest.raises(UserError, match="has no class folders|no label|no folder"):
        opened(tmp_path)


def test_images_and_archives_of_several_splits_in_data_path_are_refused(tmp_path):
    archives.write(tmp_path / "in-train-0.tar", {"a/1.png": PNG})
    archives.write(tmp_path / "in-validation-0.TAR", {"a/1.png": PNG})
    with pytest.raises(UserError, match="archives of several splits, such as in-validation-0.TAR: move"):
        opened(tmp_path, classes_optional=True)
    (tmp_path / "in-validation-0.TAR").unlink()
    (tmp_path / "1.png").write_bytes(PNG)
    with pytest.raises(UserError, match=r"holds archives \(in-train-0.tar\) beside images \(1.png\)"):
        opened(tmp_path, classes_optional=True)


def test_an_archive_without_end_mark_is_read_with_a_notice(tmp_path, capsys):
    (tmp_path / "train.tar").write_bytes(raw("a/1.png", PNG))
    save_index(tmp_path / "train.tar")
    for _ in range(2):
        assert len(opened(tmp_path)) == 1
        assert "1 archive without an end mark, of which a part may be missing" in capsys.readouterr().out
        (tmp_path / "train.tar.index").unlink(missing_ok=True)


def test_scripts_say_that_an_archive_has_no_end_mark(tmp_path, capsys):
    (tmp_path / "some.tar").write_bytes(raw("a/1.png", PNG))
    assert len(inference.find_images([tmp_path / "some.tar"])) == 1
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

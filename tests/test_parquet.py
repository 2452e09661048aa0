"""scripts/pack.py: parquet files of the Hugging Face hub, their labels, names and metadata."""

import pytest
from archives import PNG, png
from packs import listed, run, table, write_parquet

JPEG = png(3, form="jpeg")


def names_in(folder, **more):
    return [name for name, *_ in listed(folder, **more)[1]]


@pytest.mark.parametrize("paths", [(None, None), ("1.png", None), ("1.png", "x/1.png"), ("1.png", "notes.txt")])
def test_files_without_names_of_their_own_get_one_that_fits_their_content(paths, arrow, tmp_path, capsys):
    rows = [(PNG, paths[0]), (JPEG, paths[1]), (png(form="webp"), "2.png"), (png(form="tiff"), "3.png")]
    source = write_parquet(tmp_path / "train-0.parquet", rows, [0] * 4, ["a"])
    run(source, "--output", tmp_path / "out")
    expected = ["a/train-0-000000.png", "a/train-0-000001.jpg", "a/train-0-000002.webp", "a/train-0-000003.tif"]
    assert names_in(tmp_path / "out") == expected
    assert [content for *_, content in listed(tmp_path / "out")[1]] == [data for data, _ in rows]
    assert "notice: files are named by their rows' numbers, since their own names repeat" in capsys.readouterr().err


def test_one_name_in_two_classes_is_no_matter(arrow, tmp_path, capsys):
    source = write_parquet(tmp_path / "0.parquet", [(PNG, "x/1.png"), (JPEG, "1.png")], [1, 0], ["a", "b", "c"])
    run(source, "--output", tmp_path / "out")
    assert listed(tmp_path / "out") == (["a", "b", "c"], [("a/1.png", 0, JPEG), ("b/1.png", 1, PNG)])
    assert "notice" not in capsys.readouterr().err


LABELS = {  # labels, names of the classes, and the names that are listed
    "names": (["b", "a/c"], None, ["a_c/1.png", "b/0.png"]),
    "numbers with names": ([1, 0], ["x y", "a/b"], ["a_b/0.png", "x y/1.png"]),
    "numbers alone": ([10, 2], None, ["class_10/0.png", "class_2/1.png"]),
    "none": (None, None, ["images/0.png", "images/1.png"]),
    "-1": ([-1, -1], ["a", "b"], ["images/0.png", "images/1.png"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_parquet_files(case, arrow, tmp_path, capsys):
    labels, names, expected = LABELS[case]
    rows = [(PNG, "0.png"), (PNG, "1.png")]
    run(write_parquet(tmp_path / "0.parquet", rows, labels, names, column="img"), "--output", tmp_path / "out")
    assert names_in(tmp_path / "out") == expected
    assert ("/ becomes _ in the names of 1 class (a/" in capsys.readouterr().err) == ("a_" in str(expected))


def test_another_column_of_classes_and_another_of_texts(arrow, tmp_path):
    fine = table([(PNG, "0.png")], [0], ["a"], caption=["a cat"])
    stored = fine.schema.metadata[b"huggingface"].replace(b'"label"', b'"fine"')
    fine = fine.rename_columns(["caption", "image", "fine"]).replace_schema_metadata({"huggingface": stored})
    arrow.parquet.write_table(fine, tmp_path / "0.parquet")
    run(tmp_path / "0.parquet", "--output", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["a/0.png"]


@pytest.mark.parametrize("stored", ["null", '{"info": null}', '{"info": {"features": null}}', "[]"])
def test_metadata_without_features_do_not_matter(stored, arrow, tmp_path):
    rows = table([(PNG, "0.png")], [0]).replace_schema_metadata({"huggingface": stored})
    arrow.parquet.write_table(rows, tmp_path / "0.parquet")
    run(tmp_path / "0.parquet", "--output", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["class_0/0.png"]


def test_rows_without_an_image_are_left_out_and_counted(arrow, tmp_path, capsys):
    rows = [None, (PNG, None), (b"no image", None), (None, None)]
    run(write_parquet(tmp_path / "0.parquet", rows, [0] * 4, ["a"]), "--output", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["a/0-000001.png"]
    assert "left out: 3 rows without an image (" in capsys.readouterr().err

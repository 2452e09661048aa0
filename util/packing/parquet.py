"""Images to be packed from parquet files, as the Hugging Face hub stores image sets."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from util.data import pillow
from util.data.splits import NAMES, is_image
from util.errors import UserError
from util.packing.shards import PackedImages
from util.packing.sources import readable
from util.words import count_nouns, join_names


class Columns(NamedTuple):
    """What the columns of a parquet file of images are.

    Attributes:
        image: Name of the column of the images, structs of "bytes" and "path".
        label: Name of the column of their classes; None: there is none.
        classes: Names of the classes, by their numbers; None: numbers have no names, or the labels are names.
    """

    image: str
    label: str | None
    classes: list[str] | None


@dataclass
class Rows:
    """Rows of parquet files that hold an image.

    Attributes:
        file_ids: Index of each one's file.
        numbers: Its number in the file.
        sizes: The image's length in bytes.
        names: File name that is stored with it; "" for none.
        endings: File name's ending that fits its content; "" if that is no known format.
        labels: Its label as it is stored.
        empty: Rows without an image, for a message.
    """

    file_ids: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    labels: list[object] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def read_parquets(paths: list[Path]) -> PackedImages:
    """Return the images in parquet files of the Hugging Face hub, in the order of the rows.

    Raises:
        UserError: pyarrow is missing, a file is damaged or holds no images, the files are of several splits or differ
            in their columns, or labels are no classes.
    """
    # All files must agree, since numbers of classes mean nothing without their names.
    _check_one_split(paths)
    columns = _columns(paths[0])
    for path in paths[1:]:
        if _columns(path) != columns:
            raise UserError(f"{path} has other columns or class names than {paths[0]}: pack files of one data set")

    # The first pass is for sizes and names; the second one will read what is to be written.
    rows = _list_rows(paths, columns)
    of_rows, classes, notices = _name_classes(rows, columns, paths)

    # With the stored names, files are kept whatever their content: training tells of bad images.
    names = list(map(_join, of_rows, rows.names))
    chosen = list(range(len(names)))
    if not _are_file_names(names):
        chosen, names = _make_names(rows, of_rows, paths)
        if any(rows.names):
            notices.append(
                "files are named by their rows' numbers, since their own names repeat, or are not all images'"
            )
    if left_out := rows.empty:
        notices.append(f"left out: {count_nouns(len(left_out), 'row')} without an image ({join_names(left_out, 3)})")

    def read(numbers: list[int]) -> Iterator[bytes]:
        """Yield the contents of the images with these numbers, as PackedImages.read does."""
        for file_id, path in enumerate(paths):
            wanted = [chosen[number] for number in numbers if rows.file_ids[chosen[number]] == file_id]
            wanted = [rows.numbers[number] for number in wanted]
            for _, row in _read_rows(path, [columns.image], set(wanted)) if wanted else ():
                yield row[columns.image]["bytes"]

    return PackedImages(names, [rows.sizes[number] for number in chosen], classes, read, notices)


def _check_one_split(paths: list[Path]) -> None:
    """Raise a UserError if files are of several splits, by their names or by their folders'."""
    split_of = {word: split for split, words in NAMES.items() for word in words}
    first = {}
    for path in paths:
        for name in (path.name.lower(), path.absolute().parent.name.lower()):
            word = next((word for word in re.split("[^a-z]+", name) if word in split_of), None)
            if word:
                first.setdefault(split_of[word], str(path))
                break
    if len(first) > 1:
        raise UserError(f"the files are of several splits ({', '.join(first.values())}): pack those of one at a time")


def _open_parquet(path: Path) -> object:
    """Return an open parquet file of pyarrow's, which keeps no more in memory than it must.

    Raises:
        UserError: pyarrow is missing.
        OSError, ValueError: The file is damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} is a parquet file, which pyarrow reads: pip install pyarrow") from None
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _columns(path: Path) -> Columns:
    """Find the columns of a parquet file.

    Raises:
        UserError: The file is damaged, or it is not clear which columns hold the images and their classes.
    """
    with readable(path), _open_parquet(path) as file:
        schema = file.schema_arrow
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features"):
        features = features.get(key) if isinstance(features, dict) else None
    features = {name: feature for name, feature in (features or {}).items() if isinstance(feature, dict)}

    # A column's name decides, else its type does.
    images = [entry.name for entry in schema if _field_names(entry.type) >= {"bytes", "path"}]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        raise UserError(
            f"{path} has {len(images) or 'no'} columns of images, each with bytes and path, among "
            f"{join_names(schema.names)}: name the one that is meant image"
        )

    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if "label" in schema.names:
        labels = ["label"]
    if len(labels) > 1:
        raise UserError(
            f"{path} has classes in several columns ({join_names(labels)}): name the one that is meant label"
        )
    label = labels[0] if labels else None
    return Columns(images[0], label, features.get(label, {}).get("names"))


def _field_names(kind: object) -> set[str]:
    """Return the names of a struct's fields; an empty set for columns of other types."""
    count = kind.num_fields if str(kind).startswith("struct") else 0
    return {kind.field(number).name for number in range(count)}


def _read_rows(path: Path, columns: list[str], wanted: set[int] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield rows of a parquet file, one at a time, with their numbers.

    Args:
        path: The file.
        columns: Names of the columns to read.
        wanted: Numbers of the rows; None: all.

    Raises:
        UserError: The file is damaged.
    """
    with readable(path), _open_parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            numbers = range(first, first + file.metadata.row_group(group).num_rows)
            first = numbers.stop
            if wanted is not None and wanted.isdisjoint(numbers):
                continue
            batches = file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)
            for number, batch in zip(numbers, batches, strict=True):
                if wanted is None or number in wanted:
                    yield number, batch.to_pylist()[0]


def _list_rows(paths: list[Path], columns: Columns) -> Rows:
    """Read all rows, for what is to be known of each image.

    Raises:
        UserError: A file is damaged, or has the path of an image instead of its content.
    """
    rows = Rows()
    names = [columns.image, columns.label] if columns.label else [columns.image]
    for file_id, path in enumerate(paths):
        listed = tqdm(_read_rows(path, names), desc=f"listing {path.name}", unit=" rows", leave=False, disable=None)
        for number, row in listed:
            image = row[columns.image] or {"bytes": None, "path": None}
            if image["bytes"] is None and image["path"]:
                raise UserError(
                    f"{path}, row {number}, has only the path of an image ({image['path']}): pack the folder of images"
                )
            if image["bytes"] is None:
                rows.empty.append(f"{path}, row {number}")
                continue
            rows.file_ids.append(file_id)
            rows.numbers.append(number)
            rows.sizes.append(len(image["bytes"]))
            rows.names.append((image["path"] or "").rpartition("/")[2])
            rows.endings.append(_ending(image["bytes"]))
            rows.labels.append(row[columns.label] if columns.label else None)
    return rows


def _ending(data: bytes) -> str:
    """Return the ending for the name of an image file, by its content; "" if it is of no format that can be read."""
    try:
        with pillow.limit_pixels(math.inf), Image.open(io.BytesIO(data), formats=pillow.FORMATS) as image:
            kind = image.format
    except Exception:  # on a broken header Pillow raises exceptions of any kind
        return ""
    if kind in ("JPEG", "MPO"):
        return ".jpg"  # Pillow's first one is .jfif
    return next((ending for ending, name in Image.EXTENSION.items() if name == kind), "")


def _name_classes(rows: Rows, columns: Columns, paths: list[Path]) -> tuple[list[str], list[str], list[str]]:
    """Return the class of each row, "" where there are none, the names of all classes, and notices.

    Args:
        rows: The rows.
        columns: Where the labels come from.
        paths: The files, for messages.

    Raises:
        UserError: A label is missing or no class, or a class can't be the name of a folder.
    """
    # Test splits often have no labels, or -1 for each.
    if all(label is None or label == -1 for label in rows.labels):
        return [""] * len(rows.labels), [""], []
    for number, label in enumerate(rows.labels):
        count = math.inf if columns.classes is None else len(columns.classes)
        is_number = type(label) is int and 0 <= label < count
        if not is_number and not (isinstance(label, str) and columns.classes is None):
            raise UserError(
                f"{paths[rows.file_ids[number]]}, row {rows.numbers[number]}, has {label!r} as its {columns.label}, "
                "which is no class: remove the row, or all labels"
            )

    # Classes have names of their own, or get those that numbers in other archives get.
    if columns.classes is None:
        found = sorted(set(rows.labels))
        stored = {label: label if isinstance(label, str) else f"class_{label}" for label in found}
    else:
        stored = dict(enumerate(columns.classes))

    # A class becomes a folder.
    named = {label: name.replace("/", "_") for label, name in stored.items()}
    changed = [name for name in stored.values() if "/" in name]
    twice = [name for name, times in Counter(named.values()).items() if times > 1]
    if twice:
        raise UserError(f"{paths[0]} has two classes named {twice[0]!r}: rename one of them")
    impossible = [name for name in named.values() if not name or name[0] == "." or "\0" in name]
    if impossible:
        raise UserError(f"{paths[0]} has a class named {impossible[0]!r}, which can't be a folder's name: rename it")
    notices = [f"/ becomes _ in the names of {count_nouns(len(changed), 'class', 'es')} ({join_names(changed, 3)})"]
    return [named[label] for label in rows.labels], list(named.values()), notices if changed else []


def _are_file_names(names: list[str]) -> bool:
    """Return whether every name, <class>/<file> or <file>, is that of an image file, and no two are equal."""
    files = [name.rpartition("/")[2] for name in names]
    return all(file and is_image(file) and "\0" not in file for file in files) and len(set(names)) == len(names)


def _make_names(rows: Rows, classes: list[str], paths: list[Path]) -> tuple[list[int], list[str]]:
    """Return which rows to pack, by their index, and <class>/<file> of each, made from the file and the row's number.

    Args:
        rows: The rows; those that are no images, for which there is no ending, are counted as empty.
        classes: Class of each, or "".
        paths: The parquet files.
    """
    chosen, names = [], []
    for index, (name, ending) in enumerate(zip(classes, rows.endings, strict=True)):
        path, number = paths[rows.file_ids[index]], rows.numbers[index]
        if ending:
            chosen.append(index)
            names.append(_join(name, f"{path.stem}-{number:06d}{ending}"))
        else:
            rows.empty.append(f"{path}, row {number}")
    return chosen, names


def _join(folder: str, name: str) -> str:
    """Return <class>/<file>, or the file's name alone where there is no class."""
    return f"{folder}/{name}" if folder else name

"""Helpers of the tests of scripts/pack.py: zips and tables of images, and what shards list."""

import json
import tarfile
import zipfile
from pathlib import Path

import archives
from archives import PNG

from scripts import pack
from util.data import splits

SMALL = 20480  # bytes of a shard that holds about 14 of the samples: 80 of them need several


def run(*words):
    pack.main(list(map(str, words)))


def listed(folder, split="train", classes_optional=False):
    """Return the classes of a split in a folder or in its archives, and (name, class, content) of each image."""
    return archives.contents(splits.source_at(Path(folder)), split, classes_optional)


def tree(folder, members):
    """Write files, and folders, whose content is None."""
    for name, data in members.items():
        path = folder / name
        (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)
    return folder


def times(folder):
    """Return when each file was written; nothing where there is no folder."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.name != ".lock"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def gzipped(path, members, **header):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            archives.add(archive, name, data, **header)
    return path


def a_zip(*names, name="x.zip"):
    return lambda folder: zipped(folder / name, dict.fromkeys(names, PNG))


def table(rows, labels=None, names=None, column="image", **columns):
    """Return a table as the Hugging Face hub stores image sets."""
    import pyarrow

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns[column] = pyarrow.array([row and dict(zip(("bytes", "path"), row, strict=True)) for row in rows], image)
    features = {column: {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.table(columns).replace_schema_metadata(metadata)


def write_parquet(path, *args, group=7, **more):
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(*args, **more), path, row_group_size=group, write_page_checksum=True)
    return path

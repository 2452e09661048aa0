"""Write the shards of a split that are missing, and indexes of archives."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from util.data import splits
from util.data.archive_index import has_current_index, write_index
from util.disk import raise_write_errors, remove_unfinished, write_whole
from util.errors import UserError
from util.lock import lock_folder
from util.packing.shards import SHARD_SIZE, PackedImages, Shard, find_missing, plan_shards, write_shard
from util.words import count_nouns

FLAT = "images"  # folder for images that have no class


def pack_split(images: PackedImages, folder: Path, shard_size: int = SHARD_SIZE) -> None:
    """Write the shards of a split that are missing, with their indexes, and print what is there then.

    Args:
        images: The images of the split.
        folder: Folder of the shards, which is made if needed.
        shard_size: Largest number of bytes of a shard; a single image may have more.

    Raises:
        UserError: There are no images, one can't be read, the folder holds other things or can't be written to, or a
            shard reads back differently.
    """
    if flat := images.classes == [""]:
        images = replace(images, names=[f"{FLAT}/{name}" for name in images.names], classes=[FLAT])
        print(
            f"{folder}: the images lie in no class folders, and go into one folder, {FLAT}/; under these names "
            "--val_fraction holds out others"
        )
    for notice in images.notices:
        print(f"notice: {notice}", file=sys.stderr)
    shards = plan_shards(images, folder, shard_size)
    missing, unindexed = find_missing(shards, images, folder)

    # Look again once no other process can write there: one that did may have just ended.
    if missing or unindexed:
        _lock(folder)
        missing, unindexed = find_missing(shards, images, folder)
    for shard in unindexed:
        write_saved_index(shard.path)
    _write_missing(missing, images)

    # Say what is there, and what of it is new.
    classes = "without classes" if flat else f"of {count_nouns(len(images.classes), 'class', 'es')}"
    written = f"{count_nouns(len(missing), 'shard')} written now" if missing else "nothing to write"
    written += f", {count_nouns(len(unindexed), 'index', 'es')} added" if unindexed else ""
    print(
        f"{folder}: {count_nouns(len(images.names), 'image')} {classes}, {count_nouns(len(shards), 'shard')}, "
        f"{sum(shard.size for shard in shards):,} bytes; {written}"
    )


def _lock(folder: Path) -> None:
    """Make a folder if needed, lock it for this process, and remove what a process that was killed left unfinished.

    Raises:
        UserError: Another process has locked it, or it can't be written to.
    """
    with raise_write_errors(folder):
        if holder := lock_folder(str(folder)):
            raise UserError(f"{folder} is being written to by {holder}: wait for it, or choose another --output")
        remove_unfinished(folder)


def _write_missing(shards: list[Shard], images: PackedImages) -> None:
    """Write shards and their indexes, with a bar on a terminal; raises what pack_split raises."""
    wanted = [number for shard in shards for number in range(shard.first, shard.end)]
    total = sum(images.sizes[number] for number in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar, closing(images.read(wanted)) as contents:
        counted = _count_bytes(contents, bar)
        for shard in shards:
            with write_whole(shard.path) as unfinished:
                write_shard(unfinished, shard, images, counted)
            write_saved_index(shard.path)


def _count_bytes(contents: Iterator[bytes], bar: tqdm) -> Iterator[bytes]:
    for data in contents:
        bar.update(len(data))
        yield data


def write_saved_index(archive: Path) -> None:
    """Write the index of an archive, or of a link to one, beside it: ARCHIVE.index.

    Raises:
        UserError: The archive can't be used, or the index can't be written.
    """
    with write_whole(Path(f"{archive}.index")) as unfinished, unfinished.open("wb") as out:
        write_index(archive, out)


def index_archives(paths: list[Path]) -> None:
    """Write the indexes of archives, and of the archives in folders, unless they are current.

    Raises:
        UserError: A path holds no archives, an archive can't be used, or an index can't be written.
    """
    archives = []
    for path in paths:
        found = splits.source_at(path).archives
        if not found:
            raise UserError(f"{path} holds no archives: name those that are to be indexed")
        archives += found
    outdated = [archive for archive in archives if not has_current_index(archive)]
    for archive in tqdm(outdated, unit=" archives", disable=None):
        write_saved_index(archive)
    current = len(archives) - len(outdated)
    print(f"{count_nouns(len(outdated), 'index', 'es')} written, {current:,} current already")

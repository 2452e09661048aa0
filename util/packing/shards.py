"""Write the images of a split into tar archives of limited size (shards), which training reads in place.

    folder/shard-00000.tar, ...         <class>/<image>, and <class>/ for a class without images
    folder/shard-00000.tar.index, ...   where each image lies in it

Which image goes into which shard follows from names and sizes alone, and the bytes of a shard from its images: a run
that was interrupted can go on. A shard gets its name only after it was read back from the disk.
"""

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from util.data.archive_forms import common_prefix
from util.data.archive_index import clean_names, has_current_index, load_index
from util.data.listing import read_folder
from util.data.splits import ARCHIVE, OTHER_ARCHIVES, SPLITS, is_image
from util.data.tar import BadArchive
from util.errors import UserError
from util.words import join_names

SHARD_SIZE = 1 << 30  # bytes of a shard, if nothing else is asked for
# Names are stored as the bytes that they have on the disk, whatever Python takes the disk's encoding to be.
FORM = {"format": tarfile.PAX_FORMAT, "encoding": "utf-8", "errors": "surrogateescape"}


@dataclass
class PackedImages:
    """Images of a split that is to be packed.

    Attributes:
        names: <class>/<file> of each; <file> alone where there are no classes.
        sizes: Number of bytes of each.
        classes: Names of the classes, with those that have no images; [""]: there are no classes.
        read: Yields the contents of the images with the given numbers, which must ascend. Raises a UserError if one
            can't be read.
        notices: What the user should know, one line each.
    """

    names: list[str]
    sizes: list[int]
    classes: list[str]
    read: Callable[[list[int]], Iterator[bytes]]
    notices: list[str] = field(default_factory=list)


class Shard(NamedTuple):
    """A shard of some images.

    Attributes:
        path: Its path.
        first: Number of its first image.
        end: Number of the image after its last one.
        folders: Names of the folders that it holds for classes without images.
        size: Number of its bytes.
    """

    path: Path
    first: int
    end: int
    folders: list[str]
    size: int


def plan_shards(images: PackedImages, folder: Path, shard_size: int) -> list[Shard]:
    """Distribute images over shards, in their order.

    Args:
        images: The images, all in class folders.
        folder: Folder of the shards.
        shard_size: Largest number of bytes of a shard; a single image may have more.

    Raises:
        UserError: There are no images, or their names can't be those of members.
    """
    if not images.names:
        raise UserError("there are no images to pack")
    with_images = {name.partition("/")[0] for name in images.names}
    folders = [name for name in images.classes if name not in with_images]
    _refuse_names(images.names, folders)

    # A shard ends before the image that would make it too large.
    shards, first, used = [], 0, sum(_member_size(name, None) for name in folders)
    for number, (name, size) in enumerate(zip(images.names, images.sizes, strict=True)):
        needed = _member_size(name, size)
        if number > first and _archive_size(used + needed) > shard_size:
            shards.append((first, number, used))
            first, used = number, 0
        used += needed
    shards.append((first, len(images.names), used))
    return [
        Shard(folder / f"shard-{number:05d}{ARCHIVE}", first, end, [] if number else folders, _archive_size(used))
        for number, (first, end, used) in enumerate(shards)
    ]


def _refuse_names(names: list[str], folders: list[str]) -> None:
    """Check that members of these names are listed under the same names.

    Raises:
        UserError: One is hidden, leads out of the archive, occurs twice, or stands for a split.
    """
    written = [*names, *folders]
    cleaned = clean_names(Path("the split"), [os.fsencode(name) for name in written])
    for name, listed in zip(written, cleaned, strict=True):
        if name != listed:
            raise UserError(f"{name!r} would be hidden in an archive: rename what begins with a dot")
    if len(set(names)) < len(names):
        name = next(name for name, times in Counter(names).items() if times > 1)
        raise UserError(f"two images have one name, {name}: rename one of them")
    for split in SPLITS:
        if prefix := common_prefix(names, split):
            raise UserError(
                f"all images lie in {prefix}, and a folder named {split} stands for the split in an archive, not for a "
                "class: rename it"
            )


def _entry(name: str, size: int | None) -> tarfile.TarInfo:
    """Return the header of a file, or, where the size is None, of a folder; equal for equal names and sizes."""
    entry = tarfile.TarInfo(os.fsencode(name).decode(FORM["encoding"], FORM["errors"]))
    entry.mode = 0o755 if size is None else 0o644
    entry.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
    entry.size = size or 0
    return entry


def _member_size(name: str, size: int | None) -> int:
    """Return the number of bytes that a file, or a folder, takes in an archive, with all its headers."""
    header = tarfile.BLOCKSIZE
    if size is None or size >= 8**11 or len(name) > tarfile.LENGTH_NAME or not name.isascii():
        header = len(_entry(name, size).tobuf(*FORM.values()))  # ten times as slow
    return header + _round_up(size or 0, tarfile.BLOCKSIZE)


def _archive_size(members: int) -> int:
    """Return the number of bytes of an archive whose members take so many: with the end mark, in whole records."""
    return _round_up(members + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def find_missing(shards: list[Shard], images: PackedImages, folder: Path) -> tuple[list[Shard], list[Shard]]:
    """Return the shards that a folder lacks, and those of which it only lacks a current index.

    Args:
        shards: All shards of the split.
        images: Its images.
        folder: Folder of the shards, which need not exist.

    Raises:
        UserError: The folder holds other shards, or anything else that would be in the way of reading the split.
    """
    if not folder.exists():
        return shards, []
    folders, files = read_folder(str(folder))
    by_name = {shard.path.name: shard for shard in shards}
    strange = [name for name, _ in folders]
    for name in files:
        if name not in by_name:
            strange += [name] if name.lower().endswith((ARCHIVE, *OTHER_ARCHIVES)) or is_image(name) else []
        elif not _is_there(by_name[name], images):
            strange.append(name)
    if strange:
        raise UserError(
            f"{folder} holds {join_names(sorted(strange), 3)}, which packing these images with this --shard_size does "
            "not write: remove what is there, or choose another --output"
        )
    present = [shard for shard in shards if shard.path.name in files]
    return (
        [shard for shard in shards if shard.path.name not in files],
        [shard for shard in present if not has_current_index(shard.path)],
    )


def _is_there(shard: Shard, images: PackedImages) -> bool:
    """Return whether a shard's file has the size and the members that it should have; raises what load_index raises."""
    index = load_index(shard.path)
    return (
        shard.path.stat().st_size == shard.size
        and index.names == images.names[shard.first : shard.end]
        and index.sizes.tolist() == images.sizes[shard.first : shard.end]
        and index.folders == shard.folders
    )


def write_shard(path: Path, shard: Shard, images: PackedImages, contents: Iterator[bytes]) -> None:
    """Write a shard to a file, read it back from the disk, and compare.

    Args:
        path: File to write, which is to get the shard's name.
        shard: The shard.
        images: All images of the split.
        contents: Content of the shard's images, which come next.

    Raises:
        UserError: An image is not of the size that was listed, or reads back differently.
        OSError: The file can't be written.
    """
    checksums = []
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", **FORM) as archive:
            for name in shard.folders:
                archive.addfile(_entry(name, None))
            for number in range(shard.first, shard.end):
                data, name = next(contents, b""), images.names[number]
                if len(data) != images.sizes[number]:
                    raise UserError(
                        f"{name} has {len(data):,} bytes, and had {images.sizes[number]:,} when it was listed: leave "
                        "the images alone while they are packed, and start again"
                    )
                checksums.append(zlib.crc32(data))
                archive.addfile(_entry(name, len(data)), io.BytesIO(data))
                archive.members.clear()  # tarfile would keep all headers in memory

        # Drop the file from the system's page cache, so that the comparison reads it from the disk.
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _compare(path, shard, images, checksums)


def _compare(path: Path, shard: Shard, images: PackedImages, checksums: list[int]) -> None:
    """Read a shard's file, and compare names, sizes and checksums.

    Args:
        path: The file.
        shard: The shard that it is to become.
        images: All images of the split.
        checksums: CRC-32 of each of the shard's images.

    Raises:
        UserError: Something differs; the message names it.
    """
    remedy = "check the disk and the computer's memory, and start again"
    try:
        index = load_index(path)
    except BadArchive as error:
        raise UserError(f"{shard.path} can't be read back ({error}): {remedy}") from error
    found = list(zip(index.names, index.sizes.tolist(), index.offsets.tolist(), strict=True))
    if len(found) != len(checksums) or index.folders != shard.folders:
        raise UserError(f"{shard.path} reads back with other members than were written: {remedy}")

    with path.open("rb") as file:
        for number, (name, size, offset) in enumerate(found):
            file.seek(offset)
            expected = (images.names[shard.first + number], images.sizes[shard.first + number], checksums[number])
            if (name, size, zlib.crc32(file.read(size))) != expected:
                raise UserError(f"{shard.path}/{expected[0]} reads back differently from what was written: {remedy}")

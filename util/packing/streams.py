"""Images to be packed from archives that can't be read in place: zip, and compressed tar."""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from util.data.archive_forms import are_in_folders, folder_and_file
from util.data.archive_index import clean_names
from util.data.listing import LeftOut
from util.data.splits import OTHER_ARCHIVES, SPLITS, is_image
from util.data.tar import BadArchive, Member
from util.data.webdataset import LABELS, sample_key
from util.packing.shards import PackedImages
from util.packing.sources import droppable_prefix, readable
from util.words import join_names

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by an archive's first bytes
UTF8_FLAG = 0x800  # of a zip archive's member: its name is UTF-8


@dataclass
class Found:
    """Images in archives that can't be read in place.

    Attributes:
        names: <class>/<file> of each, or <file> alone.
        archive_ids: Index of each one's archive.
        positions: Its position among the archive's members.
        sizes: Its length in bytes.
        classes: As in PackedImages.
        notices: As in PackedImages.
    """

    names: list[str] = field(default_factory=list)
    archive_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def select_images(archives: list[Path], tables: list[list[Member]]) -> Found:
    """Find the images among the members of archives, and their classes.

    Args:
        archives: The archives.
        tables: Members of each archive; their offsets are positions among the members.

    Raises:
        UserError: A name leads out of the archive, or an image is a link, encrypted, or has no class while others do.
    """
    found, folders, others, labels = Found(), set(), [], []
    for archive_id, (archive, members) in enumerate(zip(archives, tables, strict=True)):
        names = clean_names(archive, [member.name.rstrip(b"/") for member in members])
        members = [(name, member) for name, member in zip(names, members, strict=True) if _is_shown(name)]
        images = [(name, member) for name, member in members if member.kind != "folder" and is_image(name)]
        beside = [name for name, member in members if member.kind == "file" and not is_image(name)]
        keys = {sample_key(name) for name, _ in images}
        labels += [name for name in beside if name.endswith(LABELS) and sample_key(name) in keys]
        others += beside
        for name, member in images:
            if member.kind != "file":
                raise BadArchive(f"{archive}/{name} is {member.kind}: unpack the archive, and pack the folder")

        # Each archive may have the split's folder, or one of the archive's own name, in front.
        names = [name for name, _ in images]
        prefix = droppable_prefix(names, [*SPLITS, _stem(archive)]) if names else ""
        found.names += [name[len(prefix) :] for name in names]
        found.archive_ids += [archive_id] * len(images)
        found.positions += [member.offset for _, member in images]
        found.sizes += [member.size for _, member in images]
        folders |= {
            name[len(prefix) :] for name, member in members if member.kind == "folder" and name.startswith(prefix)
        }
    _find_classes(found, archives, folders, others, labels)
    return found


def _is_shown(name: str) -> bool:
    """Return whether a member is neither hidden nor one of those in which macOS keeps files' attributes."""
    return bool(name) and name.partition("/")[0] != "__MACOSX"


def _stem(archive: Path) -> str:
    """Return an archive's name without its endings."""
    name = archive.name.lower()
    ending = next((ending for ending in OTHER_ARCHIVES if name.endswith(ending)), archive.suffix)
    return archive.name[: len(name) - len(ending)]


def _find_classes(found: Found, archives: list[Path], folders: set[str], others: list[str], labels: list[str]) -> None:
    """Fill in the classes, and the notices on what is left out.

    Args:
        found: The images, whose names are changed where archives stand for classes.
        archives: The archives.
        folders: Folders that have an entry of their own.
        others: Names of files that are no images.
        labels: Names of those that may be labels of images.

    Raises:
        BadArchive: Some images have a class folder and some have not, or they are WebDataset's samples.
    """
    # As in archives that are read in place, all images have class folders, or none has.
    remedy = f"unpack {join_names(map(str, archives), 3)}, sort the images, and pack the folder"
    in_folders = are_in_folders(found.names, found.names.__getitem__, remedy)

    # Labels beside the images would get lost. In class folders a .json is metadata: what it holds is not read here.
    if lost := [name for name in labels if not in_folders or name.endswith(LABELS[0])]:
        raise BadArchive(
            f"images have labels beside them ({lost[0]}), as in WebDataset, and these are read from plain tar "
            f"archives only: decompress {join_names(map(str, archives), 3)} first"
        )

    # Without class folders, several archives are classes.
    if not in_folders and len(archives) > 1:
        pairs = zip(found.archive_ids, found.names, strict=True)
        found.names = [f"{_stem(archives[archive_id])}/{name}" for archive_id, name in pairs]

    # Folders without images are classes, too.
    with_images = {name.partition("/")[0] for name in found.names}
    classes = with_images | {folder.partition("/")[0] for folder in folders} - {""}
    found.classes = sorted(classes) if "/" in "".join(found.names[:1]) else [""]
    left_out = LeftOut()
    left_out.sort_out(others, is_image)
    found.notices += [f"left out: {left_out}"] if others else []


def read_zips(paths: list[Path]) -> PackedImages:
    """Return the images in zip archives, in order of class, folder and name.

    Raises:
        UserError: An archive is damaged or encrypted; or what select_images raises.
    """
    # The archives stay open: their directories are long to read.
    archives, tables = [], []
    for path in paths:
        with readable(path):
            archives.append(zipfile.ZipFile(path))
        entries = enumerate(archives[-1].infolist())
        tables.append([Member(_zip_name(info), number, info.file_size, _zip_kind(info)) for number, info in entries])
    found = select_images(paths, tables)

    # Any member can be read at any time, so that the order may be that of folders.
    def order_key(number: int) -> tuple[str, ...]:
        class_name, _, rest = found.names[number].partition("/")
        return class_name, *folder_and_file(rest)

    order = sorted(range(len(found.names)), key=order_key)

    def read(numbers: list[int]) -> Iterator[bytes]:
        """Yield the contents of the images with these numbers, as PackedImages.read does."""
        for number in numbers:
            archive_id, position = found.archive_ids[order[number]], found.positions[order[number]]
            with readable(paths[archive_id]):
                data = archives[archive_id].read(archives[archive_id].infolist()[position])  # checks the CRC-32 as well
            yield data

    names, sizes = [found.names[number] for number in order], [found.sizes[number] for number in order]
    return PackedImages(names, sizes, found.classes, read, found.notices)


def _zip_name(info: zipfile.ZipInfo) -> bytes:
    """Return a member's name, also where the program that wrote the archive broke zip's rules."""
    # Without a flag names are of code page 437, and zipfile reads them so; macOS writes UTF-8 without it.
    name = info.filename
    if not info.flag_bits & UTF8_FLAG:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")

    # Older programs for Windows write folders with backslashes.
    return os.fsencode(name if "/" in name else name.replace("\\", "/"))


def _zip_kind(info: zipfile.ZipInfo) -> str:
    """Return the kind of a zip archive's member: "file", "folder", or what else it is, for a message."""
    if info.is_dir() or _zip_name(info).endswith(b"/"):
        return "folder"
    if stat.S_ISLNK(info.external_attr >> 16):  # the mode that Unix programs store
        return "a link"
    return "encrypted" if info.flag_bits & 1 else "file"


class StrictInfo(tarfile.TarInfo):
    """Header of a tar archive's member; a damaged one is an error, where tarfile takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        """Return the next header.

        Raises:
            ReadError: It is damaged or cut off.
        """
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error


def _stream(path: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield each member of a compressed tar archive, with a function that reads it before the next one comes.

    Raises:
        UserError: The archive is damaged or cut off; that may show only at the end.
    """
    with path.open("rb") as file:
        start = file.read(6)
    opener = next(opener for magic, opener in OPENERS.items() if start.startswith(magic))
    form = {"tarinfo": StrictInfo, "encoding": "utf-8", "errors": "surrogateescape"}
    with opener(path) as stream, tarfile.open(fileobj=stream, mode="r|", **form) as archive:
        while info := archive.next():
            yield info, lambda info=info: archive.extractfile(info).read()
            archive.members.clear()  # tarfile would keep all headers in memory

        # Read on to the end, so that the checksum of the whole is compared.
        while block := archive.fileobj.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError("it goes on after its end mark, as if archives had been joined")


def read_compressed(paths: list[Path]) -> PackedImages:
    """Return the images in compressed tar archives, in the order in which they are stored.

    Raises:
        UserError: An archive is damaged or cut off; or what select_images raises.
    """
    tables = []
    for path in paths:
        table = []
        with readable(path):
            for info, _ in tqdm(_stream(path), desc=f"listing {path.name}", unit=" members", leave=False, disable=None):
                is_folder = info.isdir() or info.name.endswith("/")  # as old programs wrote them
                kind = "folder" if is_folder else "file" if info.isreg() else "a link or special file"
                table.append(Member(info.name.encode("utf-8", "surrogateescape"), len(table), info.size, kind))
        tables.append(table)
    found = select_images(paths, tables)

    def read(numbers: list[int]) -> Iterator[bytes]:
        """Yield the contents of the images with these numbers, as PackedImages.read does."""
        for archive_id, path in enumerate(paths):
            wanted = {found.positions[number] for number in numbers if found.archive_ids[number] == archive_id}
            if not wanted:
                continue
            with readable(path), closing(_stream(path)) as members:
                for position, (_, content) in enumerate(members):
                    if position in wanted:
                        yield content()

    return PackedImages(found.names, found.sizes, found.classes, read, found.notices)

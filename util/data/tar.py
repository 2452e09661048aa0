"""Read the headers of tar archives: the names of the files in them, and where their bytes lie.

Nothing is ever extracted: a member's name is only a name. Written by hand because Python's tarfile takes seven times as
long, and shares its file position with forked processes. The formats that tar programs write are read: POSIX (ustar,
pax), GNU, and the old one before them, with names of any length. Every header's checksum is checked.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from util.errors import UserError

BLOCK = 512  # bytes of a header; the bytes of a member begin at a multiple of it, too
FIELDS = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")  # of a header: name, size, checksum, type, magic, prefix
# The types of members: files, links to other members, folders, sparse files (which leave zeros out), devices and pipes.
KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"1": "link", b"2": "link", b"5": "folder", b"S": "sparse file"}
KINDS |= dict.fromkeys((b"3", b"4", b"6"), "special file")
NEXT_HEADER, NEXT_NAME = (b"x", b"X"), b"L"  # about the member that follows: a pax header, GNU's form of a long name
SHORTENED = 98  # file names of so many bytes may be cut off in the header, with the whole name in a pax header
LONGEST = 1 << 20  # no honest name or pax header has more bytes
PIECE = 4 << 20  # bytes that are read at a time, and more than the zeros that any program writes at the end

# Compressed archives, and zips, are told by their first bytes: what to do with them.
UNPACKERS = {
    b"\x1f\x8b": "it is compressed: gunzip it, or pack it anew (scripts/pack.py)",
    b"BZh": "it is compressed: bunzip2 it",
    b"\xfd7zXZ": "it is compressed: unxz it",
    b"\x28\xb5\x2f\xfd": "it is compressed: unzstd it",
    b"PK": "it is a zip archive: python scripts/pack.py ARCHIVE --output DIR makes tar archives of it",
}


class BadArchive(UserError):
    """An archive that can't be used; the message names the archive, the problem and the remedy."""


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        name: Its name, as it is stored.
        offset: Where its bytes begin in the archive; its header lies in the 512 bytes before.
        size: Number of its bytes.
        kind: "file", "folder", or what else it is, as a word for a message.
    """

    name: bytes
    offset: int
    size: int
    kind: str


class HeaderReader:
    """Reader of the headers of one archive.

    Once the members were read, `has_end` tells whether the archive has the mark with which most programs end it.
    """

    def __init__(self, path: str, fd: int) -> None:
        """Set up the reader.

        Args:
            path: The archive, for messages.
            fd: Descriptor of the open archive; its position is neither used nor changed.
        """
        self.path, self.fd, self.end, self.has_end = path, fd, os.fstat(fd).st_size, False

    def members(self) -> Iterator[Member]:
        """Yield the members in the order in which they are stored, up to the end mark, or, without one, to the end.

        Raises:
            BadArchive: This is no plain tar archive, or it is cut off or damaged.
        """
        if not self.end:
            raise BadArchive(f"{self.path} is an empty file: copy or download it again")
        position, pax, long_name = 0, {}, b""
        while position < self.end:
            header = os.pread(self.fd, BLOCK, position)
            if header[:1] == b"\0" and header == bytes(len(header)):
                self._check_nothing_follows(position)
                self.has_end = True
                return
            try:
                name, size, kind = parse(header)
            except ValueError as error:
                raise BadArchive(self._describe_damage(header, position)) from error
            data = position + BLOCK

            # Keep the content of a header that describes the next member; skip the content of any other unknown type.
            if kind not in KINDS:
                if kind in NEXT_HEADER:
                    pax = _pax_records(self._content(data, size))
                elif kind == NEXT_NAME:
                    long_name = self._content(data, size).split(b"\0", 1)[0]
            else:
                name, kind = long_name or name, KINDS[kind]
                if pax or kind != "file" or name[-1:] == b"/":
                    name, size, kind = _apply_pax(name, size, kind, pax)
                if kind == "sparse file":
                    raise BadArchive(
                        f"{self.path} holds a sparse file, {os.fsdecode(name)}, which can't be read in place: pack the "
                        "images anew without -S (bsdtar: with --no-read-sparse)"
                    )
                yield Member(name, data, size, kind)
                pax, long_name = {}, b""
            position = data + (size + BLOCK - 1) // BLOCK * BLOCK
            if position > self.end:
                raise BadArchive(
                    f"{self.path} is cut off: it has {self.end:,} bytes, and a member goes on until {position:,}: copy "
                    "or download it again"
                )

    def _describe_damage(self, start: bytes, position: int) -> str:
        """Return a message about bytes at a position that are no header."""
        for magic, remedy in UNPACKERS.items():
            if start.startswith(magic) and not position:
                return f"{self.path} can't be read in place: {remedy}"
        problem = "is cut off" if len(start) < BLOCK else "is damaged" if position else "is no tar archive"
        return f"{self.path} {problem} (at byte {position:,}): copy or download it again, or remove it"

    def _check_nothing_follows(self, position: int) -> None:
        """Check that an archive ends at its end mark, after which programs fill up to a record with zeros.

        Raises:
            BadArchive: Something else follows, as where archives were joined byte by byte, or where a part of a
                download is missing; or more zeros follow than the longest usual record has.
        """
        while position < self.end:
            piece = os.pread(self.fd, min(PIECE, self.end - position), position)
            if not piece or piece.strip(b"\0"):
                raise BadArchive(
                    f"{self.path} goes on after its end mark (at byte {position:,}). If archives were joined, keep "
                    "them apart; else a part of it is missing: copy or download it again"
                )
            position += len(piece)
            if self.end - position > PIECE:
                raise BadArchive(
                    f"{self.path} ends in {self.end - position:,} bytes of zeros, as a download that was stopped: copy "
                    "or download it again"
                )

    def _content(self, offset: int, size: int) -> bytes:
        if size > LONGEST:
            raise BadArchive(self._describe_damage(bytes(BLOCK), offset))
        return os.pread(self.fd, size, offset)


def _apply_pax(name: bytes, size: int, kind: str, pax: dict[bytes, bytes]) -> tuple[bytes, int, str]:
    """Return the name, size and kind of a member, from its own header and the records of a pax header before it."""
    if pax:
        name = pax.get(b"path", name).split(b"\0", 1)[0]
        if re.fullmatch(rb"\d{1,18}", pax.get(b"size", b"")):
            size = int(pax[b"size"])
        if any(key.startswith(b"GNU.sparse") for key in pax):
            kind = "sparse file"
    if kind == "file" and name.endswith(b"/"):
        kind = "folder"  # as old programs wrote them
    return name, size if kind == "file" else 0, kind


def parse(header: bytes) -> tuple[bytes, int, bytes]:
    """Return the name, the size and the type that a header states.

    Raises:
        ValueError: It is no header of a tar archive, or damaged.
    """
    if len(header) != BLOCK:
        raise ValueError("cut off")
    name, size, checksum, kind, magic, prefix = FIELDS.unpack(header)

    # The checksum is the sum of all bytes, its own eight counting as spaces. Adler-32 begins with that sum, plus 1,
    # modulo 65521, and is far faster than a sum in Python. An old error of some programs sums signed bytes.
    stated = _number(checksum)
    if (stated - 8 * 32 + sum(checksum) + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
        signed = memoryview(header).cast("b")
        if stated != sum(signed[:148]) + 8 * 32 + sum(signed[156:]):
            raise ValueError("the checksum is wrong")

    # POSIX's format has the beginning of a long name at the end; GNU's has other things there.
    name = name.split(b"\0", 1)[0]
    if magic == b"ustar\0" and prefix[0]:
        name = prefix.split(b"\0", 1)[0] + b"/" + name
    return name, _number(size), kind


def header_fits(header: bytes, name: bytes, size: int) -> bool:
    """Return whether a header is that of a file with this name, without its folders, and size.

    Names that are not of ASCII alone, or so long that they may be cut off there (libarchive's end before the field's
    end), are not compared.
    """
    try:
        stated_name, stated_size, _ = parse(header)
    except ValueError:
        return False
    if stated_size != size:
        return False
    stated, listed = stated_name.rpartition(b"/")[2], name.rpartition(b"/")[2]
    comparable = b"\0" in header[:100] and name.isascii() and len(listed) < SHORTENED
    return not comparable or stated == listed


def _number(field: bytes) -> int:
    """Return the value of a header's field: octal digits, or, where they would not suffice, a binary number.

    Raises:
        ValueError: It is neither.
    """
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ") or b"0"
    if digits[0] in b"-+":
        raise ValueError("the number has a sign")
    return int(digits, 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header, lines of the form "LENGTH KEY=VALUE", up to the first damaged one."""
    records = {}
    while b" " in data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(rb"\d{1,9}", length) or not 0 < int(length) <= len(data):
            break
        key, equals, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if equals:
            records[key] = value
        data = data[int(length) :]
    return records

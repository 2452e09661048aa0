"""Take the metadata out of an image file, for files that Pillow refuses because of broken metadata.

The parts that the pixels need are copied unchanged, and so is EXIF (for the orientation) if it is intact. Pillow then
decodes the result as usual: a file whose pixels are cut off or damaged stays unreadable.
"""

import re
import struct
import zlib
from contextlib import suppress
from itertools import islice

# The parts of a file that its pixels need.
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
WEBP_CHUNKS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
WEBP_KNOWN = WEBP_CHUNKS | {b"ICCP", b"EXIF", b"XMP "}
TIFF_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293),  # baseline, and fax options
    *(274, 317, 320, 322, 323, 324, 325, 338, 339, 347),  # orientation, predictor, palette, tiles, samples, JPEG tables
    *range(512, 522),  # JPEG as in TIFF 6.0
    *(529, 530, 531, 532, 50674),  # YCbCr, LERC
}


def without_metadata(data: bytes) -> bytes | None:
    """Return the file without its metadata.

    Args:
        data: A PNG, JPEG, WebP, GIF, TIFF, AVIF or HEIF file.

    Returns:
        The file; None if it has another format, nothing was left out, or its pixels are not all there.
    """
    for start, strip in STRIPPERS:
        if re.match(start, data, re.DOTALL):
            with suppress(IndexError, struct.error):  # cut off
                bare = strip(data)
                return None if bare == data else bare
    return None


def _strip_png(data: bytes) -> bytes | None:
    """Keep the chunks of the pixels, each of which must have its right checksum, and whole EXIF."""
    kept, position = [data[:8]], 8
    while position is not None and position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        name, end = data[position + 4 : position + 8], position + 12 + length
        is_whole = _png_chunk_is_whole(data, position)
        if name in PNG_CHUNKS and not is_whole:
            return None
        if name in PNG_CHUNKS or (name == b"eXIf" and is_whole):
            kept.append(data[position:end])
        if name == b"IEND":
            break

        # A broken chunk may have a wrong length. If no whole chunk follows, look for the next one that pixels need.
        if is_whole or _png_chunk_is_whole(data, end):
            position = end
        else:
            found = re.compile(b"PLTE|tRNS|IDAT|IEND").finditer(data, position + 8)
            starts = (match.start() - 4 for match in islice(found, 100))
            position = next((start for start in starts if _png_chunk_is_whole(data, start)), None)
    return b"".join(kept)


def _png_chunk_is_whole(data: bytes, position: int) -> bool:
    if position + 12 > len(data):
        return False
    (length,) = struct.unpack_from(">I", data, position)
    end = position + 8 + length
    return end + 4 <= len(data) and zlib.crc32(data[position + 4 : end]) == int.from_bytes(data[end : end + 4], "big")


def _strip_jpeg(data: bytes) -> bytes:
    """Leave out comments and application segments, except EXIF and those from which the colour space follows."""
    kept, position = [data[:2]], 2
    while position < len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker in (0x00, 0xFF):  # stray bytes between segments, which decoders skip
            position += 1
            continue
        if marker == 0xDA:  # the scan: from here on there are pixels
            kept.append(data[position:])
            break
        segment = data[position : position + 2 + max(2, *struct.unpack_from(">H", data, position + 2))]
        content = segment[4:]
        is_metadata = marker == 0xFE or 0xE0 <= marker <= 0xEF
        gives_colours = len(content) >= 12 and content.startswith((b"JFIF\0", b"Adobe"))
        if not is_metadata or gives_colours or content.startswith(b"Exif\0\0"):
            kept.append(segment)
        position += len(segment)
    return b"".join(kept)


def _strip_webp(data: bytes) -> bytes | None:
    """Keep the chunks of the pixels, and EXIF where it is whole; correct the file's length."""
    kept, position = [], 12
    while position + 8 <= len(data):
        name, (size,) = data[position : position + 4], struct.unpack_from("<I", data, position + 4)
        content, end = position + 8, position + 8 + size
        is_whole = end <= len(data)
        if name in WEBP_CHUNKS or (name == b"EXIF" and is_whole):
            kept.append(data[position:end] + b"\0" * (size % 2))

        # After a chunk of the pixels, another one or the end must follow. Other chunks may have a wrong length: if
        # nothing that is known follows, look for the next chunk of the pixels.
        position = end + size % 2
        follows = is_whole and (position >= len(data) or data[position : position + 4] in WEBP_KNOWN)
        if name in WEBP_CHUNKS and not follows:
            return None
        if not follows:
            found = re.compile(b"VP8[ LX]|ALPH|ANIM|ANMF").search(data, content)
            position = found.start() if found else len(data)

    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_gif(data: bytes) -> bytes:
    """Leave out the extensions before the first picture, except a whole graphic control (transparency)."""
    colours = 3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0
    position = 13 + colours
    kept = [data[:position]]
    while data[position] == ord("!"):
        end = position + 2
        while data[end]:  # sub-blocks, each after its length; the last one is empty
            end += data[end] + 1
        if data[position + 1] == 0xF9 and data[position + 2] >= 4:
            kept.append(data[position : end + 1])
        position = end + 1
    return b"".join(kept) + data[position:]


def _strip_tiff(data: bytes) -> bytes:
    """Leave out those tags of the first page that do not describe its pixels; all else stays where it is."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    count_format, entry_size, offset_format = (
        (order + "Q", 20, order + "Q") if is_big else (order + "H", 12, order + "I")
    )
    (start,) = struct.unpack_from(offset_format, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(count_format, data, start)
    first = start + struct.calcsize(count_format)
    end = first + count * entry_size

    # The shorter list of tags takes the place of the old one, with the offset of the next page behind it.
    entries = [data[at : at + entry_size] for at in range(first, min(end, len(data)), entry_size)]
    entries = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in TIFF_TAGS]
    next_page = data[end : end + struct.calcsize(offset_format)]
    page = struct.pack(count_format, len(entries)) + b"".join(entries) + next_page
    return data[:start] + page + data[start + len(page) :]


def _strip_heif(data: bytes) -> bytes:
    """Rename the EXIF items of an AVIF or HEIF file, so that decoders pass them over; its rotation lies elsewhere."""
    # An item's entry: "infe", version, three bytes of flags, number of the item, two bytes of protection, kind.
    entry = rb"(infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2})Exif"
    return re.sub(entry, rb"\1none", data, flags=re.DOTALL)


STRIPPERS = (
    (rb"\x89PNG\r\n\x1a\n", _strip_png),
    (rb"\xff\xd8\xff", _strip_jpeg),
    (rb"RIFF....WEBP", _strip_webp),
    (rb"GIF8[79]a", _strip_gif),
    (rb"II[*+]\0|MM\0[*+]", _strip_tiff),
    (rb"....ftyp", _strip_heif),
)

"""Helpers of the tests of odd image files: a picture, and files of it in which the caller puts metadata."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from util.data.images import PixelSpec, decode

RANDOM = np.random.default_rng(0)
PICTURE = np.kron(RANDOM.integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 40 x 56, in squares
H, W = PICTURE.shape[:2]


def encode(form, picture=PICTURE, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()


def noise(*shape, dtype=np.uint8):
    return RANDOM.integers(0, 256, shape).astype(dtype)


def png_chunk(name, content, crc_is_right=True):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content) ^ (not crc_is_right))
    )


def webp(*chunks, flags=8):
    parts = encode("WEBP", lossless=True)
    name, (size,) = parts[12:16], struct.unpack("<I", parts[16:20])
    canvas = struct.pack("<I", W - 1)[:3] + struct.pack("<I", H - 1)[:3]
    before = [chunk for chunk in chunks if chunk[0] == b"ICCP"]
    behind = [chunk for chunk in chunks if chunk[0] != b"ICCP"]
    body = b"WEBP"
    for kind, content, *length in [
        (b"VP8X", bytes([flags, 0, 0, 0]) + canvas),
        *before,
        (name, parts[20 : 20 + size]),
        *behind,
    ]:
        body += kind + struct.pack("<I", *(length or [len(content)])) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_with(*segments):
    data = encode("JPEG", quality=95)
    return data[:2] + b"".join(b"\xff" + bytes([m]) + struct.pack(">H", len(s) + 2) + s for m, s in segments) + data[2:]


def tiff_with(tags, next_page=0):
    """An uncompressed TIFF of the picture, with further tags: {tag: (type, number of values, value of 4 bytes)}.

    None as a tag's description leaves the tag out.
    """
    short, long = (lambda value: (3, 1, struct.pack("<HH", value, 0))), (lambda value: (4, 1, struct.pack("<I", value)))
    tags = {
        256: short(W),
        257: short(H),
        258: short(8),
        259: short(1),
        262: short(2),
        277: short(3),
        278: short(H),
    } | tags
    tags = {tag: value for tag, value in tags.items() if value}
    end = 10 + 12 * (len(tags) + 2) + 4
    tags |= {279: long(PICTURE.size), 273: long(end)}
    entries = b"".join(struct.pack("<HHI", tag, *tags[tag][:2]) + tags[tag][2] for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", next_page) + PICTURE.tobytes()


def tiff_of(array, **more):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack"} | more)
    return file.getvalue()


def assert_is_the_picture(data, form, **more):
    for exif in (False, True):
        rgb = decode(f"a.{form}", data, PixelSpec(exif=exif, **more))
        assert rgb.shape == (H, W, 3)
        assert np.abs(rgb.astype(int) - PICTURE).mean() <= (0 if form in ("png", "webp", "tif") else 8)
        assert decode(f"a.{form}", data, PixelSpec(1, exif=exif)).shape == (H, W, 1)

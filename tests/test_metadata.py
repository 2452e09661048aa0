"""Broken metadata of images, which must not cost the image: chunks, EXIF, segments, tags."""

import io
import struct
import zlib

import numpy as np
import pytest
from odd_pictures import (
    PICTURE,
    H,
    W,
    assert_is_the_picture,
    encode,
    jpeg_with,
    noise,
    png_chunk,
    tiff_of,
    tiff_with,
    webp,
)
from PIL import Image

from util.data import pillow
from util.data.images import BadImage, PixelSpec, decode

# Outside of pytest, which brings filters of its own, what Pillow warns of single files is silenced by util.data.pillow.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


def png_with(chunk, behind_pixels=False, png=None):
    png = png or encode("PNG")
    at = png.index(b"IEND") - 4 if behind_pixels else 33
    return png[:at] + chunk + png[at:]


LONG_TEXT = zlib.compress(b"a" * (3 << 20))
PNG_CHUNKS = {
    **{f"{name.decode()} checksum": png_chunk(name, b"k\0\0abcdefgh", False) for name in (b"tEXt", b"zTXt", b"eXIf")},
    "tIME checksum": png_chunk(b"tIME", b"1234567", False),
    "two broken": png_chunk(b"tEXt", b"a\0b", False) + png_chunk(b"iCCP", b"a\0\0b", False),
    "iTXt too long": png_chunk(b"iTXt", b"k\0\1\0\0\0" + LONG_TEXT),
    "zTXt too long": png_chunk(b"zTXt", b"k\0\0" + LONG_TEXT),
    "iCCP too long": png_chunk(b"iCCP", b"k\0\0" + LONG_TEXT),
    "many texts": b"".join(
        png_chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(b"a" * 1_000_000)) for number in range(70)
    ),
    "pHYs short": png_chunk(b"pHYs", b"12"),
    "cHRM short": png_chunk(b"cHRM", b"1"),
    "unknown method": png_chunk(b"zTXt", b"k\0\7abc"),
    "APNG out of order": png_chunk(b"fcTL", struct.pack(">I", 7) + bytes(22)),
    "length too large": struct.pack(">I", 30) + b"tEXta\0b" + bytes(4),
    "length too small": struct.pack(">I", 2) + b"tEXta\0bcdefgh" + bytes(4),
    "length absurd": struct.pack(">I", 2**31) + b"iTXta\0b" + bytes(4),
    "key transparency": png_chunk(b"tEXt", b"transparency\0no"),
    "key bbox": png_chunk(b"tEXt", b"bbox\0no"),
    "another picture inside": png_chunk(b"tEXt", b"thumbnail\0" + encode("PNG", noise(H, W, 3)), False),
}


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize("kind", PNG_CHUNKS)
def test_broken_chunks_of_a_png_do_not_matter(kind, behind_pixels, exif):
    data = png_with(PNG_CHUNKS[kind], behind_pixels)
    assert np.array_equal(decode("a.png", data, PixelSpec(exif=exif)), PICTURE)


@pytest.mark.parametrize("mode", ["P", "LA", "1", "I;16", "RGBA"])
def test_what_pixels_need_survives_broken_chunks(mode):
    picture = Image.fromarray(PICTURE).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 200)
    whole = io.BytesIO()
    picture.save(whole, "PNG", **({"transparency": 3} if mode == "P" else {}))
    for chunk in (PNG_CHUNKS["pHYs short"], PNG_CHUNKS["iCCP too long"]):
        for channels in (1, 3, 4):
            data = png_with(chunk, png=whole.getvalue())
            expected = decode("a.png", whole.getvalue(), PixelSpec(channels))
            assert np.array_equal(decode("a.png", data, PixelSpec(channels)), expected)


def damaged_pngs():
    png = encode("PNG", noise(60, 60, 3))
    start = png.index(b"IDAT")
    checksum = bytearray(png)
    checksum[-16] ^= 255
    flipped = bytearray(png)
    flipped[start + 40] ^= 255
    broken = PNG_CHUNKS["pHYs short"]
    return {
        "cut off": png_with(broken, png=png)[: start + 400],
        "checksum": png_with(broken, png=bytes(checksum)),
        "flipped": png_with(broken, png=bytes(flipped)),
        "palette lost": png_with(broken, png=encode("PNG", noise(9, 9)).replace(b"IDAT", b"IDAX")),
        "header broken": png_with(broken, png=png[:20] + b"\xff" + png[21:]),
        "cut off, text whole": png[: start + 400],
        "pixels in the text": png[:33] + struct.pack(">I", 9) + b"tEXt" + png[33 : start + 300],
    }


@pytest.mark.parametrize("kind", damaged_pngs())
def test_a_png_with_damaged_pixels_stays_bad(kind):
    with pytest.raises(BadImage, match="a.png"):
        decode("a.png", damaged_pngs()[kind], PixelSpec())


def exif_with(entry, more=b"", count=1):
    """EXIF with an entry for the orientation: type, number of values, value."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, count, 274, *entry[:2]) + entry[2] + more + bytes(4)


TURNED = exif_with((3, 1, b"\6\0\0\0"))
EXIF = {
    "junk": b"Exif\0\0garbagegarbage",
    "empty": b"Exif\0\0",
    "cut off": TURNED[:19],
    "0": exif_with((3, 1, b"\0\0\0\0")),
    "9": exif_with((3, 1, b"\x09\0\0\0")),
    "a string": exif_with((2, 4, b"6\0\0\0")),
    "a fraction": exif_with((11, 1, struct.pack("<f", 2.5))),
    "division by zero": exif_with((5, 1, struct.pack("<I", 26)), struct.pack("<II", 1, 0)),
    "unknown type": exif_with((77, 1, b"\6\0\0\0")),
    "offset too far": b"Exif\0\0II*\0" + struct.pack("<I", 2**32 - 1),
    "60,000 entries": exif_with((3, 1, b"\1\0\0\0"), count=60_000),
}


def avif_with(exif):
    room = b"Exif\0\0II*\0" + struct.pack("<IHHHI4s", 8, 1, 305, 2, 4, b"abc\0") + bytes(200)
    data, content = encode("AVIF", exif=room, quality=100, subsampling="4:4:4"), room[6:]
    at = data.index(content)
    return data[:at] + exif[6:].ljust(len(content), b"\0")[: len(content)] + data[at + len(content) :]


CARRIERS = {
    "png": lambda exif: png_with(png_chunk(b"eXIf", exif[6:])),
    "jpg": lambda exif: jpeg_with((0xE1, exif)),
    "webp": lambda exif: webp((b"EXIF", exif)),
    "avif": avif_with,
}


@pytest.mark.parametrize("form", CARRIERS)
@pytest.mark.parametrize("kind", EXIF)
def test_an_orientation_that_is_unknown_means_the_picture_as_it_is(kind, form):
    assert_is_the_picture(CARRIERS[form](EXIF[kind]), form)


@pytest.mark.parametrize("form", CARRIERS)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8])
def test_known_orientations_are_applied_as_pillow_does(number, form, monkeypatch):
    from PIL import ImageOps

    data = CARRIERS[form](exif_with((3, 1, bytes([number, 0, 0, 0]))))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    for library in ("with simplejpeg", None):
        if library is None:
            monkeypatch.setattr("util.data.images.simplejpeg", None)
        assert np.array_equal(decode(f"a.{form}", data, PixelSpec(exif=True)), turned)


@pytest.mark.parametrize("value", ["6", b"6", [6], (6, 1), 6.0, None, 0, 9, -1])
def test_orientations_of_another_type_are_unknown(value):
    class Img:
        def getexif(self):
            return {0x0112: value}

        def transpose(self, method):
            raise AssertionError(method)

    img = Img()
    assert pillow.turn_upright(img) is img


def test_a_whole_orientation_counts_beside_other_metadata_that_is_broken():
    for form, data in {
        "png": png_with(png_chunk(b"eXIf", TURNED[6:]) + PNG_CHUNKS["pHYs short"]),
        "jpg": jpeg_with((0xE1, TURNED), (0xE2, b"ICC_PROFILE\0")),
        "webp": webp((b"EXIF", TURNED), (b"XMP ", b"abcd", 400)),
    }.items():
        assert decode(f"a.{form}", data, PixelSpec(1, exif=True)).shape == (W, H, 1), form
        assert decode(f"a.{form}", data, PixelSpec(1)).shape == (H, W, 1), form


MPF = b"MPF\0II*\0" + struct.pack("<IH", 8, 2)
SEGMENTS = {
    "ICC short": (0xE2, b"ICC_PROFILE\0\1"),
    "ICC count": (0xE2, b"ICC_PROFILE\0\1\7junk"),
    "JFIF short": (0xE0, b"JFIF\0"),
    "Adobe short": (0xEE, b"Adobe\0"),
    "Photoshop short": (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "Photoshop size": (0xED, b"Photoshop 3.0\x008BIM\x03\xee\0\0\xff\xff\xff\xff"),
    "XMP junk": (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
    "MPF cut off": (0xE2, MPF),
    "MPF string": (0xE2, MPF + struct.pack("<HHI4sI", 0xB001, 2, 4, b"abc\0", 0)),
    "FlashPix": (0xE2, b"FPXR\0"),
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_broken_segments_of_a_jpeg_do_not_matter(kind, monkeypatch):
    data = jpeg_with(SEGMENTS[kind])
    assert_is_the_picture(data, "jpg")
    monkeypatch.setattr("util.data.images.simplejpeg", None)
    assert_is_the_picture(data, "jpg")


WEBP = {
    "ICC junk": webp((b"ICCP", b"junk"), flags=32),
    "ICC too long": webp((b"ICCP", b"junk", 400), flags=32),
    "ICC too short": webp((b"ICCP", b"junkjunk", 4), flags=32),
    "XMP absurd": webp((b"XMP ", b"junk", 2**32 - 1), flags=4),
    "EXIF absurd": webp((b"EXIF", b"junk", 2**32 - 2)),
    "EXIF twice": webp((b"EXIF", b"junk"), (b"EXIF", b"more")),
    "EXIF missing": webp(),
    "file longer than it is": (lambda data: data[:4] + struct.pack("<I", len(data) + 500) + data[8:])(webp()),
}


@pytest.mark.parametrize("kind", WEBP)
def test_broken_chunks_of_a_webp_do_not_matter(kind):
    assert_is_the_picture(WEBP[kind], "webp")


def test_a_webp_with_damaged_pixels_stays_bad():
    data = webp((b"EXIF", b"junk", 400))
    at = data.index(b"VP8L") + 30
    lossy = encode("WEBP", noise(99, 99, 3), exif=TURNED)
    for damaged in (data[:at], data[:at] + data[at + 7 :], lossy[:600], lossy[:600] + lossy[607:]):
        with pytest.raises(BadImage):
            decode("a.webp", damaged, PixelSpec())


@pytest.mark.parametrize(
    "block",
    [b"!\xf9\1\1\0", b"!\xf9\0", b"!\xf9\2\1\0\0", b"!\xff\0", b"!\x77\0", b"!\xff\x0bNETSCAPE2.0\0", b"!\xfe\1a\0"],
)
def test_odd_extensions_of_a_gif_do_not_matter(block):
    form = io.BytesIO()
    Image.fromarray(PICTURE).quantize(64).save(form, "GIF")
    data = form.getvalue()
    at = 13 + (3 << ((data[10] & 7) + 1))
    assert_is_the_picture(data[:at] + block + data[at:], "gif")


def test_a_gif_with_an_odd_extension_keeps_its_transparency():
    """The graphic control, which says what is transparent, stays; a comment that is none goes."""
    form, img = io.BytesIO(), Image.new("P", (8, 6), 1)
    img.putpalette([255, 0, 0, 0, 0, 255])
    img.putpixel((0, 0), 0)
    img.save(form, "GIF", transparency=0)
    data = form.getvalue()
    at = 13 + (3 << ((data[10] & 7) + 1))
    assert data[at : at + 2] == b"!\xf9"
    for odd in (b"", b"!\xf9\1\1\0", b"!\xff\0"):
        rgb = decode("a.gif", data[:at] + odd + data[at:], PixelSpec())
        assert rgb[0, 0].tolist() == [255, 255, 255] and rgb[1, 1].tolist() == [0, 0, 255]  # laid over white


TIFF_TAGS = {
    "EXIF too far": {34665: (4, 1, b"\xff\xff\xff\xff")},
    "EXIF before the file": {34853: (9, 1, struct.pack("<i", -5))},
    "GPS string": {34853: (2, 4, b"abc\0")},
    "XMP numbers": {700: (3, 2, b"abcd")},
    "XMP string": {700: (2, 4, b"abc\0")},
    "resolution string": {282: (2, 4, b"abc\0"), 296: (3, 1, b"\3\0\0\0")},
    "profile": {34675: (3, 2, b"junk")},
    "orientation 0": {274: (3, 1, b"\0\0\0\0")},
    "orientation 99": {274: (3, 1, b"\x63\0\0\0")},
    "orientation string": {274: (2, 2, b"6\0\0\0")},
}


@pytest.mark.parametrize("kind", TIFF_TAGS)
def test_odd_tags_of_a_tiff_do_not_matter(kind):
    assert_is_the_picture(tiff_with(TIFF_TAGS[kind]), "tif")


@pytest.mark.parametrize("offset", [2**31, 60, 8])
def test_a_page_behind_the_picture_that_is_broken_does_not_matter(offset):
    assert_is_the_picture(tiff_with({}, next_page=offset), "tif")


def test_nothing_but_the_message_is_said(tmp_path, script):
    files = {
        "mpo.jpg": jpeg_with(SEGMENTS["MPF string"]),
        "exif.webp": webp((b"EXIF", EXIF["60,000 entries"])),
        "tags.tif": tiff_with(TIFF_TAGS["profile"]),
        "page.tif": tiff_with({}, next_page=60),
        "samples.tif": tiff_of(noise(9, 11, 13, dtype=np.uint16), planarconfig="contig"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    words = (
        "import sys, tifffile\nfrom util.data.pillow import *\n"
        "for name in sys.argv[1:]:\n"
        "    for look in (Image.Image.load, orientation, lambda img: img.n_frames):\n"
        "        try: look(Image.open(name, formats=FORMATS))\n"
        "        except Exception: pass\n"
        "    try: tifffile.imread(name)\n"
        "    except Exception: pass\n"
    )
    done = script("-c", words, *(tmp_path / name for name in files))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""TIFFs: those that Pillow can't read, pages that are channels or are not, and values of which 0 is white."""

import io
import sys

import numpy as np
import pytest
from odd_pictures import RANDOM, encode, noise, tiff_of, tiff_with
from PIL import Image

from util.data import datasets, tiff
from util.data.images import BadImage, PixelSpec, WrongChannels, decode
from util.data.splits import DataSpec
from util.errors import UserError

# Outside of pytest, which brings filters of its own, what Pillow warns of single files is silenced by util.data.pillow.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


# TIFFs that Pillow can't read.


@pytest.mark.parametrize("tag", [256, 257])
def test_a_tiff_without_width_or_height_has_no_samples(tag):
    assert tiff.samples(tiff_with({})) == 3 and tiff.samples(tiff_with({tag: None})) == 0


ARRAYS = {
    "13 x uint16": RANDOM.integers(0, 3000, (9, 11, 13)).astype(np.uint16),
    "3 x float32": RANDOM.normal(size=(9, 11, 3)).astype(np.float32),
    "5 x uint8": noise(9, 11, 5),
    "2 x uint8": noise(9, 11, 2),
    "7 x int16": RANDOM.integers(-99, 99, (9, 11, 7)).astype(np.int16),
    "6 x float64": RANDOM.normal(size=(9, 11, 6)),
    "4 x uint16": RANDOM.integers(0, 65536, (9, 11, 4)).astype(np.uint16),
}
LAYOUTS = {
    "contiguous": lambda array: tiff_of(array, planarconfig="contig"),
    "planar": lambda array: tiff_of(array.transpose(2, 0, 1).copy(), planarconfig="separate"),
    "BigTIFF": lambda array: tiff_of(array, planarconfig="contig", bigtiff=True),
    "big-endian": lambda array: tiff_of(array, planarconfig="contig", byteorder=">", metadata=None),
    "deflate": lambda array: tiff_of(array, planarconfig="contig", compression="zlib"),
    "tiles": lambda array: tiff_of(array, planarconfig="contig", tile=(16, 16)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_samples_of_a_tiff_become_what_a_npy_file_gives(kind, layout, capfd):
    array, npy = ARRAYS[kind], io.BytesIO()
    np.save(npy, array)
    channels = PixelSpec(array.shape[2])
    got, expected = (decode(*file, channels) for file in (("a.tif", LAYOUTS[layout](array)), ("a.npy", npy.getvalue())))
    assert got.dtype == expected.dtype and np.array_equal(got, expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["13 x uint16", "5 x uint8", "6 x float64"])
def test_a_stack_behind_the_tags_of_one_page_is_read_whole(kind):
    array = ARRAYS[kind]
    data, pixels = tiff_of(array.transpose(2, 0, 1).copy(), truncate=True), PixelSpec(array.shape[2])
    scale = 65535 if array.dtype == np.uint16 else 1
    assert np.array_equal(decode("a.tif", data, pixels), (array / scale).astype(np.float32))
    with pytest.raises(BadImage, match="cut off"):
        decode("a.tif", data[:-9], pixels)
    with pytest.raises(WrongChannels, match=r"1 page\(s\) of 1 channel\(s\)|this array is"):
        decode("a.tif", data, PixelSpec(9))


def test_infrared_beside_rgb_is_not_lost():
    array = noise(9, 11, 4)
    data = tiff_of(array, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode("a.tif", data, PixelSpec(4)), array)
    assert np.array_equal(decode("a.tif", data, PixelSpec(3)), array[..., :3])


def test_without_tifffile_infrared_is_not_replaced_by_an_opaque_channel(monkeypatch):
    data = tiff_of(noise(9, 11, 4), photometric="rgb", extrasamples=["unspecified"])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(WrongChannels, match="pip install tifffile"):
        decode("a.tif", data, PixelSpec(4))
    assert decode("a.tif", data, PixelSpec(3)).shape == (9, 11, 3)


def test_another_number_of_channels_than_a_tiff_has_is_said():
    data = tiff_of(ARRAYS["13 x uint16"], planarconfig="contig")
    with pytest.raises(WrongChannels, match=r"a.tif: --in_chans 4, but this array is \[9, 11, 13\]"):
        decode("a.tif", data, PixelSpec(4))
    with pytest.raises(WrongChannels, match=r"--in_chans 5, but this file has 1 page\(s\) of 3 channel"):
        decode("a.tif", encode("TIFF"), PixelSpec(5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["13 x uint16", "6 x float64"])
def test_a_tiff_that_is_cut_off_stays_bad(kind, layout):
    array = ARRAYS[kind]
    data = LAYOUTS[layout](array)
    for length in (len(data) - 20, len(data) - 200, 30):
        with pytest.raises(BadImage) as caught:
            decode("a.tif", data[:length], PixelSpec(array.shape[2]))
        assert type(caught.value) is BadImage and ("cut off" in str(caught.value) or length == 30)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiff_of(ARRAYS["13 x uint16"], planarconfig="contig"), "13 samples per pixel, uint16"),
        (lambda: tiff_of(ARRAYS["3 x float32"], planarconfig="contig"), "3 samples per pixel, float32"),
        (lambda: LAYOUTS["planar"](ARRAYS["7 x int16"]), "7 samples per pixel, int16"),
        (lambda: LAYOUTS["planar"](ARRAYS["13 x uint16"]), "13 samples per pixel, uint16"),
        (lambda: tiff_of(noise(9, 11, 5), photometric="rgb", extrasamples=[0, 0]), "5 samples per pixel, uint8"),
        (lambda: tiff_of(noise(9, 11).astype(np.float16)), "1 sample per pixel, float16"),
        (lambda: tiff_with({258: None, 277: (3, 1, b"\5\0\0\0")}), "5 samples per pixel, uint1"),  # 1 bit by default
    ],
)
def test_without_tifffile_the_first_file_says_what_to_install(make, said, tmp_path, monkeypatch):
    data, channels = make(), int(said.split()[0])
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.tif").write_bytes(data)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    message = f"0.tif: a TIFF of {said}, which Pillow can't read: pip install tifffile, or store the image as .npy"
    pixels = PixelSpec(channels, (0.0,) * channels, (1.0,) * channels)
    with pytest.raises(UserError, match=message):
        datasets.open_split(datasets.Images, DataSpec(str(tmp_path)), "train", None, pixels)


def test_a_compression_that_needs_another_package_is_said(monkeypatch):
    tifffile = pytest.importorskip("tifffile")

    def refuse(self, **more):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    data = tiff_of(ARRAYS["13 x uint16"], planarconfig="contig")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", refuse)
    with pytest.raises(WrongChannels, match="uint16, compressed by NONE, which .*: pip install imagecodecs, or"):
        decode("a.tif", data, PixelSpec(13))


def test_a_tiff_names_no_other_files(monkeypatch):
    """OME-TIFFs may refer to other files, which are not followed."""
    tifffile = pytest.importorskip("tifffile")
    asked = {}
    monkeypatch.setattr(tifffile, "TiffFile", lambda file, **more: asked.update(more) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiff.read(b"", None)
    assert asked == {"is_ome": False, "is_mmstack": False, "is_ndtiff": False}


# Pages that are channels, and pages that are not.


def tiff_of_pages(*pages, kind=0):
    """A TIFF of Pillow's images, whose first page is marked as this kind (NewSubfileType)."""
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], tiffinfo={254: kind})
    return file.getvalue()


def with_overviews():
    """An image with two smaller copies, as geographic programs store them."""
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for step in (1, 2, 4):
            writer.write(PAGES[0][::step, ::step], photometric="minisblack", subfiletype=int(step > 1))
    return file.getvalue()


PAGES = noise(3, 8, 12)
GREY = [Image.fromarray(page) for page in PAGES]
OTHER_PAGES = {
    "overviews": with_overviews,
    "another size": lambda: tiff_of_pages(*GREY[:2], GREY[2].resize((6, 4))),
    "another type": lambda: tiff_of_pages(*GREY[:2], Image.fromarray(PAGES[2].astype(np.float32))),
    "marked as overviews": lambda: tiff_of_pages(*GREY, kind=1),
    "marked as masks": lambda: tiff_of_pages(*GREY, kind=4),
    "scanned text": lambda: tiff_of_pages(*(page.convert("1") for page in GREY)),
    "palettes": lambda: tiff_of_pages(*(page.convert("P") for page in GREY)),
}


@pytest.mark.parametrize("kind", OTHER_PAGES)
def test_pages_that_are_no_channels_leave_the_first_image(kind):
    first = GREY[0].convert("1") if kind == "scanned text" else GREY[0]
    assert np.array_equal(decode("a.tif", OTHER_PAGES[kind](), PixelSpec()), np.array(first.convert("RGB")))


def test_equal_pages_are_channels():
    for kind in (0, 2):  # unmarked, or marked as pages, as some programs mark all
        assert np.array_equal(decode("a.tif", tiff_of_pages(*GREY, kind=kind), PixelSpec()), PAGES.transpose(1, 2, 0))
    masks = [page.convert("1") for page in (*GREY, *GREY)]
    stacked = decode("a.tif", tiff_of_pages(*masks), PixelSpec(6))
    assert np.array_equal(stacked, np.stack([np.array(mask) * np.uint8(255) for mask in masks], axis=2))


# Values of which 0 is white.


@pytest.mark.parametrize("order", "<>")  # Pillow reads the one, tifffile the other
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_zero_may_be_white(dtype, order):
    values = np.array([[0, 1000], [30000, 65535]], np.uint16)
    values = (values >> 8).astype(np.uint8) if dtype == np.uint8 else values
    data = tiff_of(values, photometric="miniswhite", byteorder=order)
    expected = ~values if dtype == np.uint8 else ((65535 - values) / 65535).astype(np.float32)
    for exif in (False, True):
        assert np.array_equal(decode("a.tif", data, PixelSpec(1, exif=exif))[..., 0], expected)


def test_whole_numbers_of_32_bits_are_never_inverted():
    """Their largest number is none that a pixel has."""
    values = np.array([[0, 1], [2, 2048]], np.uint32)
    data = tiff_of(values, photometric="miniswhite")
    assert np.array_equal(decode("a.tif", data, PixelSpec(1))[..., 0], values.astype(np.float32))


def test_zero_may_be_white_in_colours_and_in_every_page():
    values = np.array([[0, 1000], [30000, 65535]], np.uint16)
    data = tiff_of(values, photometric="miniswhite")
    assert decode("a.tif", data, PixelSpec())[..., 1].tolist() == [[255, 251], [138, 0]]
    stacked = decode("a.tif", tiff_of(np.stack([values] * 5), photometric="miniswhite"), PixelSpec(5))
    assert np.array_equal(stacked[..., 4], ((65535 - values) / 65535).astype(np.float32))

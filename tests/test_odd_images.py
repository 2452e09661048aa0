"""Odd image files: long strips, transparent grey, size limits, hostile files."""

import io
import os
import random
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from odd_pictures import RANDOM, assert_is_the_picture, encode, noise, png_chunk, tiff_of
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from scripts import mean_std
from util import errors, inference, options
from util.data import datasets, pillow, transforms
from util.data.images import EXTENSIONS, FORMATS, BadImage, PixelSpec, decode
from util.errors import UserError

# Outside of pytest, which brings filters of its own, what Pillow warns of single files is silenced by util.data.pillow.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


# Long strips.


def whole_then_cut(crop, pixels):
    (height, width), (h, w) = pixels.shape[:2], crop.cover
    size = (h, width * h // height) if h * width >= w * height else (height * w // width, w)
    return center_crop(transforms.to_size(pixels, size), crop.size)


@pytest.mark.parametrize("shape", [(33, 1320), (1480, 37), (1, 41), (60, 2), (90, 1800)])
@pytest.mark.parametrize(("size", "channels", "dtype"), [(32, 3, np.uint8), ((27, 48), 1, np.float32), (64, 13, "f4")])
def test_the_middle_of_a_strip_is_that_of_the_whole_strip(shape, size, channels, dtype):
    pixels, crop = noise(*shape, channels, dtype=dtype), transforms.CentreCrop(size)
    ours, whole = crop(pixels), whole_then_cut(crop, pixels)
    assert ours.shape == whole.shape and ours.dtype == whole.dtype
    assert (ours.double() - whole.double()).abs().max() <= (1 if ours.dtype == torch.uint8 else 0.1)


@pytest.mark.parametrize("height", [47, 49, 98, 103])
def test_a_strip_fills_the_picture_without_a_margin_too(height):
    """Of some heights, times what they are resized by, rounding makes a pixel less."""
    pixels, crop = noise(height, height * 20, 3), transforms.CentreCrop(32, 1.0)
    assert (crop(pixels).int() - whole_then_cut(crop, pixels).int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(37, 591), (10, 160), (160, 10), (100, 70), (3, 48)])
@pytest.mark.parametrize("size", [32, (16, 64), (64, 16)])
def test_pictures_up_to_sixteen_to_one_keep_their_pixels(shape, size):
    pixels, crop = noise(*shape, 3), transforms.CentreCrop(size)
    assert torch.equal(crop(pixels), whole_then_cut(crop, pixels))


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 65_000)])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (3, np.float32), (13, np.float32)])
def test_a_strip_takes_little_memory_in_every_transform(shape, channels, dtype, monkeypatch):
    sizes = []

    def interpolate(*args, **more):
        sizes.append(result := original(*args, **more))
        return result

    original = F.interpolate
    monkeypatch.setattr(F, "interpolate", interpolate)
    pixels, ones = noise(*shape, channels, dtype=dtype), (1.0,) * channels
    finetune = transforms.FinetuneTransform(
        64, (0.08, 1), None, "rand-m9-mstd0.5-inc1", 0.25, "pixel", 1, PixelSpec(channels, ones, ones)
    )
    crops = [transforms.Crop(64, (0.2, 1)), transforms.Crop(64, (0.2, 1), one_draw=True), finetune]
    for seed in range(3):
        random.seed(seed)
        results = [transform(pixels) for transform in (transforms.CentreCrop(64), *crops)]
        assert all(img.shape == (channels, 64, 64) for img in (*results[:-1], results[-1].img))
    assert max(out.numel() for out in sizes) <= channels * (2 * transforms.LONG) * 74 * 74


# Transparent colours of PNGs, which Pillow compares with values of 8 bits.


def png_of(depth, colour_type, row, transparent):
    """A PNG of two pixels, with the colour that is transparent."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


TRANSPARENT = {  # bits, and a PNG whose first pixel is transparent; the second one's values of 8 bits
    "1": (png_of(1, 0, b"\x40", b"\0\0"), [255] * 3),
    "2": (png_of(2, 0, b"\x60", b"\0\1"), [170] * 3),
    "4": (png_of(4, 0, b"\x5a", b"\0\5"), [170] * 3),
    "8": (png_of(8, 0, b"\5\x0a", b"\0\5"), [10] * 3),
    "16": (png_of(16, 0, struct.pack(">HH", 1000, 25700), struct.pack(">H", 1000)), [100] * 3),
    "3 x 8": (png_of(8, 2, b"\1\2\3\4\5\6", b"\0\1\0\2\0\3"), [4, 5, 6]),
    "3 x 16": (png_of(16, 2, b"\1\x10\2\x20\3\x30\4\0\5\0\6\0", b"\1\x10\2\x20\3\x30"), [4, 5, 6]),
}


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("bits", TRANSPARENT)
def test_what_is_transparent_becomes_white_at_every_depth(bits, exif):
    data, second = TRANSPARENT[bits]
    assert decode("a.png", data, PixelSpec(exif=exif)).tolist() == [[[255] * 3, second]]
    grey = decode("a.png", data, PixelSpec(1, exif=exif))
    assert grey[0, 0, 0] == (1 if grey.dtype == np.float32 else 255) > grey[0, 1, 0] or bits == "1"


# Statistics of a folder.


def save_all(folder, arrays):
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)


def printed_figures(capsys, channels):
    words = capsys.readouterr().out.split()
    return [np.array(words[words.index(f"--{name}") + 1 :][:channels], float) for name in ("mean", "std")]


@pytest.mark.parametrize("offset", [0, 1e6])
def test_figures_do_not_depend_on_blocks_and_keep_their_digits(offset, tmp_path, capsys, monkeypatch):
    arrays = [RANDOM.normal(offset, 2, (h, w, 2)).astype(np.float32) for h, w in ((9, 31), (1, 50), (40, 3))]
    save_all(tmp_path, arrays)
    monkeypatch.setattr(mean_std, "SIDE", 8)
    assert max(max(block.shape[:2]) for array in arrays for block in mean_std._blocks(array)) == 8
    mean_std.main([str(tmp_path), "--in_chans", "2"])
    values = np.concatenate([array.reshape(-1, 2) for array in arrays]).astype(np.float64)
    mean, std = printed_figures(capsys, 2)
    assert mean == pytest.approx(values.mean(0), rel=1e-5) and std == pytest.approx(values.std(0), rel=1e-5)


@pytest.mark.parametrize("value", [0, 77, 255, 0.1, 1e7])
def test_channels_that_never_change_are_said_and_get_a_deviation_that_can_be_passed_on(value, tmp_path, capsys):
    dtype = np.float32 if value in (0.1, 1e7) else np.uint8
    arrays = [noise(9, 7 + number, 3, dtype=dtype) for number in range(3)]
    for array in arrays:
        array[..., 1] = value
    save_all(tmp_path, arrays)
    mean_std.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "# channel 2 never changes" in out
    std = out.split("--std ")[1].split()
    assert std[1] == "1" and std[0] != "1" != std[2]


def test_an_unreadable_image_is_left_out_of_the_figures_and_named(tmp_path, capsys):
    save_all(tmp_path, [noise(5, 5, 3) for _ in range(4)])
    (tmp_path / "0.npy").write_bytes(b"junk")
    (tmp_path / "3.npy").write_bytes((tmp_path / "2.npy").read_bytes()[:-9])
    with pytest.raises(errors.Incomplete, match="2 of 4 images could not be read"):
        mean_std.main([str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out.startswith("# 2 images\n--mean") and "0.npy" in printed.err and "3.npy" in printed.err


@pytest.mark.parametrize(("count", "tried"), [(2, 2), (200, datasets.TRIES)])
def test_where_no_image_can_be_read_statistics_end_soon(count, tried, tmp_path, refusal):
    save_all(tmp_path, [np.zeros((2, 2, 5), np.uint8)] * count)
    said = refusal(lambda: mean_std.main([str(tmp_path)]))
    assert (
        said.startswith(f"error: none of the first {tried} images") and "--in_chans" in said and said.count("\n") == 1
    )


# Limits of size.


def large_files():
    grey = noise(300, 500)
    pages = io.BytesIO()
    Image.fromarray(grey[:9, :9]).save(pages, "TIFF", save_all=True, append_images=[Image.fromarray(grey)])
    return {
        "a.png": (encode("PNG", grey), 3),
        "a.jpg": (encode("JPEG", grey), 3),
        "a.webp": (encode("WEBP", np.dstack([grey] * 3)), 3),
        "a.ico": (encode("ICO", np.dstack([grey[:250, :250]] * 3), sizes=[(250, 250)]), 3),
        "pages.tif": (pages.getvalue(), 2),
        "samples.tif": (tiff_of(noise(300, 500, 13), planarconfig="contig"), 13),
    }


def test_pages_are_checked_whatever_pillow_does(monkeypatch):
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda *args, **more: None)
    with pytest.raises(BadImage, match="pages.tif: 0.15 megapixels, above the limit of 0.05"):
        decode("pages.tif", large_files()["pages.tif"][0], PixelSpec(2, max_megapixels=0.05))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.ico", "pages.tif", "samples.tif"])
@pytest.mark.parametrize("simplejpeg", [True, False])
def test_a_limit_counts_for_every_way_to_decode(name, simplejpeg, monkeypatch):
    data, channels = large_files()[name]
    if not simplejpeg:
        monkeypatch.setattr("util.data.images.simplejpeg", None)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match=f"{name}: 0.[01]\\d megapixels, above the limit of 0.05: raise it with --max_"):
        decode(name, data, PixelSpec(channels, max_megapixels=0.05))
    if name != "pages.tif":  # its pages differ in size
        assert decode(name, data, PixelSpec(channels, max_megapixels=0.16)).shape[2] == channels
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_the_flag_that_the_message_names_is_enough(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # a stand-in for Pillow's 89 million
    data = encode(form, noise(401, 503))
    with pytest.raises(BadImage, match="above the limit of 0.1: ") as caught:
        decode("a", data, PixelSpec())
    enough = float(str(caught.value).split("--max_megapixels ")[1].split()[0])
    assert 0.2 < enough < 0.22 and decode("a", data, PixelSpec(max_megapixels=enough)).shape == (401, 503, 3)


def test_the_message_for_200_megapixels():
    data = b"P5 20000 10000 255\n"
    said = (
        "a.pgm: 200 megapixels, above the limit of 179: raise it with --max_megapixels 200 if the file is to be trusted"
    )
    with pytest.raises(BadImage, match=said):
        decode("a.pgm", data, PixelSpec())
    with pytest.raises(BadImage, match="truncated"):  # it is looked at
        decode("a.pgm", data, PixelSpec(max_megapixels=200))


def test_every_script_hands_the_limit_on(tmp_path):
    import main_predict
    import main_pretrain

    words = ["--max_megapixels", "300"]
    assert options.pixels(main_pretrain.get_args(words)).max_megapixels == 300
    args = main_predict.get_args([*words, "--resume", "a", "--images", "b", "--output", str(tmp_path / "c.csv")])
    assert inference.preprocessing_as_trained({"args": {"max_megapixels": 5}}, 3, args).pixels.max_megapixels == 300
    args.max_megapixels = -1
    with pytest.raises(UserError, match="--max_megapixels -1 must be greater than 0"):
        inference.check(args)
    (tmp_path / "a.png").write_bytes(encode("PNG"))
    with pytest.raises(UserError, match="--max_megapixels 0.01"):
        mean_std.main([str(tmp_path), "--max_megapixels", "0.001"])


# Hostile files.

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(picture):
    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x0a"), (3, 30, b"\0\x0a"), (3, 120, b"\0\5"), (8, 10, picture)]
    return b"".join(bytes([0x1C, *tag]) + struct.pack(">H", len(content)) + content for *tag, content in fields)


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
@pytest.mark.parametrize(
    "data", [EPS, iptc(EPS), b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)).ljust(28, b"\0") + EPS]
)
def test_a_program_named_as_a_picture_starts_nothing(name, data, tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)

    def popen(*args, **more):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(BadImage, match=f"{name}: not an image"):
        decode(name, data, PixelSpec())
    assert not (tmp_path / "started").exists()


def test_only_pictures_that_pillow_decodes_by_itself_are_opened():
    assert {"JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"} <= set(FORMATS)
    assert not set(FORMATS) & {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
    assert {".npy", ".jpg", ".jfif", ".mpo", ".tif", ".webp", ".gif", ".jp2"} <= set(EXTENSIONS)
    assert not set(EXTENSIONS) & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".mpg"}
    assert list(EXTENSIONS) == sorted(set(EXTENSIONS)) and all(ending == ending.lower() for ending in EXTENSIONS)


@pytest.mark.skipif(pillow.pillow_heif is not None, reason="pillow-heif is installed")
def test_without_its_package_a_heic_names_it(tmp_path, refusal):
    heic = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    for name in ("a.heic", "a.jpg"):  # telephones' files are renamed at times
        with pytest.raises(BadImage, match=f"{name}: a HEIC: pip install pillow-heif"):
            decode(name, heic, PixelSpec())
    for number in range(2):
        (tmp_path / f"{number}.HEIC").write_bytes(heic)
    said = refusal(lambda: inference.find_images([tmp_path]))
    assert ".heic 2: pip install pillow-heif" in said


def test_heic_is_read_where_its_package_is_installed():
    pytest.importorskip("pillow_heif")
    assert ".heic" in EXTENSIONS and pillow.pillow_heif
    assert_is_the_picture(encode("HEIF", quality=95), "heic")


def npy(array, **more):
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy(np.array([{}, 1], object), allow_pickle=True), "Object arrays cannot be loaded"),
        (npy(np.zeros((9, 9, 3)))[:-8], "the file is cut off: it has 1936 bytes of pixels instead of 1944"),
        (npy(np.zeros((9, 9, 3), np.uint8)).replace(b"(9, 9, 3)", b"(9999999999999, 9, 3)"), "cut off|header"),
        (b"PK\3\4" + bytes(90), "magic string"),
        (b"", "a.npy"),
    ],
)
def test_hostile_arrays_are_bad_images(data, said):
    with pytest.raises(BadImage, match=said):
        decode("a.npy", data, PixelSpec())

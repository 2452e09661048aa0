"""Damaged files: an image is read or a bad image, a checkpoint is refused or holds the same values."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import same

from util import misc
from util.data.images import BadImage, PixelSpec, load_array
from util.errors import UserError

TESTS = Path(__file__).parent
CHECKPOINTS = ("golden/reference_pretrain_checkpoint.pth", "old_checkpoints/pretrain_middle.pth")
FORMATS = ("jpeg", "progressive", "png", "palette", "webp", "gif", "bmp", "tiff", "lzw", "ppm", "npy")


def damage(data, chance):
    """Return a copy with some bits flipped, its end cut off, or a piece missing, zeroed or doubled."""
    copy, kind = bytearray(data), chance.choice(["bits", "cut", "gap", "zeros", "doubled"])
    start = chance.randrange(len(copy))
    if chance.random() < 0.3:
        start = max(0, len(copy) - chance.randrange(1, 4000))  # within the zip archive's directory
    end = min(len(copy), start + chance.choice([1, 10, 1000, 10_000]))
    if kind == "bits":
        for _ in range(chance.choice([1, 1, 8])):
            copy[min(len(copy) - 1, start + chance.randrange(64))] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        copy[start:end] = bytes(end - start)
    else:
        copy[start:] = {"cut": b"", "gap": copy[end:], "doubled": copy[start:end] + copy[start:]}[kind]
    return bytes(copy)


@pytest.mark.parametrize("source", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused_or_loads_the_same_values(source, tmp_path):
    data = (TESTS / source).read_bytes()
    whole, chance, refused = misc.load_checkpoint(str(TESTS / source)), random.Random(source), 0
    file = tmp_path / "copy.pth"
    for _ in range(200):
        file.write_bytes(damage(data, chance))
        try:
            loaded = misc.load_checkpoint(str(file))
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
            continue
        assert same(loaded["model"], whole["model"]) and same(loaded["optimizer"], whole["optimizer"])
        assert loaded["epoch"] == whole["epoch"]
    assert refused > 150


def photo(form):
    """Return a file of one of FORMATS, of 60 x 45 pixels, with metadata where the format has some."""
    img = Image.open(next((TESTS / "photos").glob("*.jpg"))).convert("RGB").resize((60, 45))
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x010E], exif[0x0112] = "a picture", 6
    if form == "npy":
        np.save(out, np.asarray(img))
        return out.getvalue()
    kinds = {"progressive": "jpeg", "palette": "png", "lzw": "tiff"}
    more = {"jpeg": {"exif": exif}, "progressive": {"progressive": True}, "png": {"exif": exif}, "webp": {"exif": exif}}
    more |= {"lzw": {"compression": "tiff_lzw"}}
    if form in ("palette", "gif"):
        img = img.quantize(32)
    img.save(out, kinds.get(form, form), **more.get(form, {}))
    return out.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_image_is_an_array_or_a_bad_image(form, tmp_path, capfd):
    """3,300 in all. No warning of Pillow reaches the user; what libtiff prints of compressed TIFFs does."""
    ending = {"progressive": "jpg", "palette": "png", "lzw": "tif"}.get(form, form)
    data, chance = photo(form), random.Random(form)
    file = tmp_path / f"x.{ending}"
    file.write_bytes(data)
    assert load_array(str(file), PixelSpec(exif=True)).shape == ((60, 45, 3) if b"a picture" in data else (45, 60, 3))
    bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            file.write_bytes(damage(data, chance))
            try:
                array = load_array(str(file), PixelSpec(exif=True, max_megapixels=1.0))
            except BadImage as error:
                bad += 1
                assert str(error).startswith(str(file)) and "\n" not in str(error)
                continue
            assert array.dtype in (np.uint8, np.float32) and array.ndim == 3 and array.shape[2] == 3
            assert array.size and np.isfinite(array).all()
    assert 30 < bad < 300
    said = capfd.readouterr()
    assert form == "lzw" or not said.out + said.err

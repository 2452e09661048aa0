"""Convert what was decoded, images of Pillow and arrays, to the number of channels that the model takes.

The rules stand at the top of util/data/images.py.
"""

import io
import math

import numpy as np
from PIL import Image

from util.data import pillow, tiff


class BadImage(Exception):
    """A file that is no readable image; the message names the file and the reason."""


class WrongChannels(BadImage):
    """A file that can't be converted to the model's number of channels."""


def to_channels(img: Image.Image, channels: int, tiff_pages: int) -> np.ndarray:
    """Convert Pillow's image to an array of 1, 3 or 4 channels.

    Args:
        img: The loaded image.
        channels: Number of channels to return.
        tiff_pages: Number of pages of a TIFF file; 0: the file has another format.

    Raises:
        WrongChannels: Another number of channels is asked for, or four of a TIFF of several pages.
        ValueError: Some pixels are not finite.
    """
    if channels == 3:
        return np.array(to_rgb(img))
    if channels == 1:
        return _to_grey(img, is_tiff=tiff_pages > 0)
    if channels == 4 and tiff_pages < 2:
        return _to_four_channels(img)
    raise WrongChannels(
        f"--in_chans {channels}, but this file has {tiff_pages or 1} page(s) of {len(img.getbands())} channel(s): "
        "change --in_chans, or store the image as .npy or as a TIFF with a page per channel"
    )


def _to_grey(img: Image.Image, is_tiff: bool) -> np.ndarray:
    if _is_deep(img):
        # Of other formats than TIFF, Pillow gives 16 bits as 32-bit whole numbers; a TIFF's are 32 bits in the file.
        return _scale(_deep_values(img)[..., None], int32_is_16_bits=not is_tiff)
    if img.has_transparency_data:
        img = to_rgb(img)
    return np.array(img.convert("L"))[..., None]


def _to_four_channels(img: Image.Image) -> np.ndarray:
    if img.mode == "CMYK":
        return np.array(img)
    if _is_deep(img):
        img = to_rgb(img)
    return np.array(img.convert("RGBA"))


def _is_deep(img: Image.Image) -> bool:
    """Return whether the image has more than 8 bits: one channel of floats or of 16- or 32-bit whole numbers."""
    return img.mode == "F" or img.mode.startswith("I")


def _deep_values(img: Image.Image) -> np.ndarray:
    """Return the values of an image of more than 8 bits, with two conversions that Pillow makes for 8 bits only.

    These are the inversion of a TIFF in which 0 is white, and the white ground under a PNG's transparent grey.
    """
    values = np.asarray(img)
    if img.mode.startswith("I;16") and tiff.zero_is_white(img):
        values = ~values
    transparent = img.info.get("transparency")
    return np.where(values == transparent, 65535, values) if isinstance(transparent, int) else values


def are_channels(img: Image.Image, count: int) -> bool:
    """Return whether the pages of a TIFF, of one channel each, are channels of one image.

    They are not if they differ in size or type, have palettes, are marked as overviews or masks, or are of 1 bit where
    three are expected, as scanned texts are.

    Args:
        img: The opened file, which is at its first page afterwards.
        count: Number of its pages.

    Raises:
        DecompressionBombError: A page has more pixels than allowed.
    """
    kinds, marked = set(), False
    for number in range(count):
        img.seek(number)
        pillow.check_size(*img.size)  # as Pillow itself does in newer versions
        kinds.add((img.size, img.mode))
        marked |= tiff.is_marked(img)
    img.seek(0)
    return len(kinds) == 1 and not marked and img.mode != "P" and not (img.mode == "1" and count == 3)


def stack_pages(img: Image.Image, channels: int) -> np.ndarray:
    """Return the pages of a TIFF that are channels (`are_channels`) as those of an array."""
    pages = []
    for number in range(channels):
        img.seek(number)
        pages.append(_deep_values(img) if _is_deep(img) else np.array(img))
    return _scale(np.stack(pages, axis=2))


def load_npy(data: bytes) -> np.ndarray:
    """Return the array of a .npy file.

    Raises:
        ValueError: The file is cut off, of another format, or holds Python objects.
    """
    # A header may claim any size, for which NumPy would ask for memory before it reads.
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    expected, held = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if held < expected and not dtype.hasobject:
        raise ValueError(f"the file is cut off: it has {held} bytes of pixels instead of {expected}")
    return np.load(io.BytesIO(data), allow_pickle=False)


def check_shape(shape: tuple[int, ...], channels: int) -> None:
    """Check that an array is [H, W, channels], [channels, H, W] or, of one channel, [H, W].

    Raises:
        WrongChannels: It has another shape.
    """
    fits = (len(shape) == 2 and channels == 1) or (len(shape) == 3 and channels in (shape[0], shape[2]))
    if not fits:
        raise WrongChannels(
            f"--in_chans {channels}, but this array is {list(shape)}: change --in_chans, or store the image as "
            f"[H, W, {channels}] or [{channels}, H, W]"
        )


def from_array(values: np.ndarray, channels: int) -> np.ndarray:
    """Bring the array of a .npy file or of tifffile to [H, W, channels], its values as `_scale` returns them.

    Raises:
        WrongChannels: It has another number of channels.
    """
    check_shape(values.shape, channels)
    if values.ndim == 2:
        values = values[..., None]
    elif values.shape[2] != channels:
        values = values.transpose(1, 2, 0)
    return _scale(values)


def _scale(values: np.ndarray, int32_is_16_bits: bool = False) -> np.ndarray:
    """Return uint8 as it is, bool as 0 or 255 in uint8, uint16 as float32 from 0 to 1, other values as float32.

    Args:
        values: The array, of any type.
        int32_is_16_bits: Treat 32-bit whole numbers as unsigned 16-bit ones.

    Raises:
        ValueError: The array is empty or complex, or some pixels are not finite.
    """
    if not values.size or np.iscomplexobj(values):
        raise ValueError(f"pixels of type {values.dtype} and shape {list(values.shape)} cannot be used")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    is_16_bits = values.dtype.newbyteorder("=") == np.uint16 or (int32_is_16_bits and values.dtype == np.int32)
    scaled = values.astype(np.float32) / (65535 if is_16_bits else 1)
    if not np.isfinite(scaled).all():
        raise ValueError("some pixels are not finite")
    return scaled


def to_rgb(img: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to 8-bit RGB, by the rules of util/data/images.py.

    Raises:
        ValueError: Some pixels are not finite.
    """
    if img.mode == "RGB" and not img.has_transparency_data:
        return img
    if _is_deep(img):
        return Image.fromarray(_to_8_bits(_deep_values(img), img.mode)).convert("RGB")
    if img.has_transparency_data:
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    return img.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("some pixels are not finite")
    if mode.startswith("I") and low >= 0 and high <= 65535:
        values = values / 257
    elif low >= 0 and high <= 1:
        values = values * 255
    else:
        values = (values - low) * (255 / max(high - low, 1e-300))  # a constant image becomes black
    return np.rint(values).astype(np.uint8)

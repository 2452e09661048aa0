"""The room where image files become arrays of pixels, by one set of rules.

Three channels (--in_chans) are 8-bit RGB:
    16-bit grey        divided by 257 (65535 becomes 255), not clipped
    32-bit, float      whole numbers of 0 to 65535 as 16-bit; 0 to 1 times 255; else the image's own range becomes 0 to
                       255
    alpha              laid over white
    palette, 1-bit, grey, CMYK and others    Pillow's conversion to RGB
    animated           the first frame
    EXIF orientation   applied where asked for (--exif); published figures were made without
One channel is grey: 8 bits, or float32 from 0 to 1 where the file has 16; float files and TIFFs of 32-bit whole numbers
as they are.
Four are RGBA of 8 bits, or a file's own CMYK. Any number comes from
    .npy               [H, W, C], [C, H, W] or, of one channel, [H, W]; 8 bits, float32 from 0 to 1 where the file has
                       16 unsigned bits, else the values as they are, as float32
    TIFF               of as many pages, each of one channel; likewise
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

try:
    import simplejpeg
except ImportError:  # no wheel for the platform: Pillow does it all
    simplejpeg = None

# Between one and two times Pillow's limit it only warns, image by image; beyond that it refuses, as a bad image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """A file that is no readable image; the message names the file and the reason."""


class WrongChannels(BadImage):
    """A file that has another number of channels than the model."""


class Pixels(NamedTuple):
    """How files become the model's input: channels; their mean and standard deviation, of pixels from 0 to 1 where the
    file has 8 or 16 bits; whether EXIF orientation counts."""

    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    exif: bool = False

    @staticmethod
    def usual(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation where none are given: ImageNet's, for grey their averages; None for others."""
        if channels == 1:
            return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else None

    @classmethod
    def of(cls, args: dict, channels: int) -> "Pixels":
        """Those that a checkpoint's args were trained with."""
        mean, std = args.get("mean"), args.get("std")
        if not mean or not std:
            mean, std = cls.usual(channels) or ((0.0,) * channels, (1.0,) * channels)
        return cls(channels, tuple(mean), tuple(std))


def load_array(path: str, exif: bool = False, channels: int = 3) -> np.ndarray:
    """The file's pixels, [H, W, C] of 8 bits or float32. Raises BadImage where it is empty, cut off, not an image, or
    absurdly large, WrongChannels where it has others than it should."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    return decode(path, data, exif, channels)


def decode(path: str, data: bytes, exif: bool, channels: int = 3) -> np.ndarray:
    """What load_array gives, from the file's bytes.

    Plain JPEGs go through simplejpeg, a third faster than Pillow and bit-equal to it (both are libjpeg-turbo);
    everything else, and what simplejpeg refuses, goes through Pillow, which has the last word.
    """
    try:
        if path.lower().endswith(".npy"):
            return _from_numpy(np.load(io.BytesIO(data), allow_pickle=False), channels)
        if channels == 3 and simplejpeg and jpeg_size(data, exif):
            with suppress(ValueError):
                return simplejpeg.decode_jpeg(data, "RGB")
        with Image.open(io.BytesIO(data)) as img:
            if img.format == "TIFF" and img.n_frames == channels > 1 and len(img.getbands()) == 1:
                return _pages(img, channels)
            img.load()
            pages = img.n_frames if img.format == "TIFF" else 0
            return _to_channels(ImageOps.exif_transpose(img) if exif else img, channels, pages)
    except MemoryError:
        raise
    except BadImage as error:
        raise type(error)(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: not an image, or empty") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken header leads them to
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise BadImage(f"{path}: {reason}") from error


def _to_channels(img: Image.Image, channels: int, pages: int) -> np.ndarray:
    """pages: of a TIFF; 0: another format, of which Pillow gives 16 bits as 32-bit whole numbers."""
    if channels == 3:
        return np.array(to_rgb(img))
    if channels == 1:
        if img.mode == "F" or img.mode.startswith("I"):
            return _scaled(np.asarray(img)[..., None], whole_is_16_bits=not pages)
        return np.array((to_rgb(img) if img.has_transparency_data else img).convert("L"))[..., None]
    if channels == 4 and pages < 2:
        deep = img.mode == "F" or img.mode.startswith("I")
        return np.array(img if img.mode == "CMYK" else (to_rgb(img) if deep else img).convert("RGBA"))
    raise WrongChannels(
        f"--in_chans {channels}, and this file has {pages or 1} page(s) of {len(img.getbands())} "
        "channel(s): take .npy, or TIFF with a page for each"
    )


def _pages(img: Image.Image, channels: int) -> np.ndarray:
    pages = []
    for number in range(channels):
        img.seek(number)
        pages.append(np.array(img))
    return _scaled(np.stack(pages, axis=2))


def _from_numpy(values: np.ndarray, channels: int) -> np.ndarray:
    if values.ndim == 2 and channels == 1:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != channels:
        raise WrongChannels(f"--in_chans {channels}, and this array is {list(values.shape)}: [H, W, C] wanted")
    return _scaled(values)


def _scaled(values: np.ndarray, whole_is_16_bits: bool = False) -> np.ndarray:
    """8 bits as they are; 16 bits as 0 to 1; others as float32."""
    if not values.size or np.iscomplexobj(values):
        raise ValueError(f"pixels of type {values.dtype} and shape {list(values.shape)}")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    whole = whole_is_16_bits and values.dtype == np.int32
    found = values.astype(np.float32) / (65535 if values.dtype.newbyteorder("=") == np.uint16 or whole else 1)
    if not np.isfinite(found).all():
        raise ValueError("pixels that are not finite")
    return found


def jpeg_size(data: bytes, exif: bool) -> tuple[int, int] | None:
    """Height and width of a plain JPEG; None for anything else, and for those that are Pillow's: CMYK, to be turned,
    huge, with a broken header."""
    if not simplejpeg or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray") or height * width > Image.MAX_IMAGE_PIXELS:
        return None
    try:
        turned = exif and Image.open(io.BytesIO(data)).getexif().get(Base.Orientation, 1) != 1
    except Exception:  # as above
        return None
    return None if turned else (height, width)


def to_rgb(img: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB, by the rules above. Raises ValueError for floats that are not finite."""
    if img.mode == "RGB" and not img.has_transparency_data:
        return img.copy()
    if img.mode == "F" or img.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(img), img.mode)).convert("RGB")
    if img.has_transparency_data:
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    return img.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("pixels that are not finite")
    if mode.startswith("I") and low >= 0 and high <= 65535:
        values = values / 257
    elif low >= 0 and high <= 1:
        values = values * 255
    else:
        values = (values - low) * (255 / max(high - low, 1e-300))
    return np.rint(values).astype(np.uint8)

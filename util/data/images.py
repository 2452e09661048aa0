"""Decode image files into arrays of pixels, by one set of rules.

Three channels (--in_chans) are 8-bit RGB:
    16-bit grey        divided by 257 (65535 becomes 255), not clipped
    32-bit, float      whole numbers of 0 to 65535 as 16-bit; 0 to 1 times 255; else the image's own range becomes 0 to
                       255
    alpha              laid over white
    palette, 1-bit, grey, CMYK and others    Pillow's conversion to RGB
    animated           the first frame
    EXIF orientation   applied on request (--exif); published results were obtained without
One channel is grey: 8 bits, or float32 from 0 to 1 where the file has 16; the values of float files and of TIFFs of
32-bit whole numbers are kept, as float32.
Four channels are 8-bit RGBA, or a file's own CMYK. Any number of channels can be read from
    .npy               [H, W, C], [C, H, W] or, of one channel, [H, W]; 8 bits, float32 from 0 to 1 where the file has
                       16 unsigned bits, else the file's values as float32
    TIFF               with as many pages of one channel each; values as from .npy
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
except ImportError:  # there is no wheel for the platform: Pillow decodes everything
    simplejpeg = None

# Between one and two times its limit of pixels Pillow warns for every image; beyond, it refuses, and the image is bad.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """A file that is no readable image; the message names the file and the reason."""


class WrongChannels(BadImage):
    """A file that can't be converted to the model's number of channels."""


class Pixels(NamedTuple):
    """How image files become the model's input.

    Attributes:
        channels: Number of channels.
        mean: Mean of every channel: of pixels scaled to 0 to 1, or of a file's own values where these are kept.
        std: Standard deviation of every channel, likewise.
        exif: Whether to apply the EXIF orientation.
    """

    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    exif: bool = False

    @staticmethod
    def default_mean_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return ImageNet's mean and standard deviation: for 3 channels as they are, for 1 averaged, else None."""
        if channels == 1:
            return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else None

    @classmethod
    def from_args(cls, args: dict, channels: int) -> "Pixels":
        """Return the channels, mean and std that a checkpoint was trained with, from its args; exif stays False.

        Unless both mean and std are set, both are default_mean_std's, or 0 and 1 where it has none.
        """
        mean, std = args.get("mean"), args.get("std")
        if not mean or not std:
            mean, std = cls.default_mean_std(channels) or ((0.0,) * channels, (1.0,) * channels)
        return cls(channels, tuple(mean), tuple(std))


def load_array(path: str, exif: bool = False, channels: int = 3) -> np.ndarray:
    """Read and decode an image file.

    Args:
        path: The file.
        exif: Whether to apply the EXIF orientation.
        channels: Number of channels to return.

    Returns:
        The pixels [H, W, C], of 8 bits or float32.

    Raises:
        BadImage: The file can't be read, is empty, cut off, no image, or absurdly large.
        WrongChannels: The file can't give this number of channels.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    return decode(path, data, exif, channels)


def decode(path: str, data: bytes, exif: bool, channels: int = 3) -> np.ndarray:
    """Decode the bytes of an image file, by the rules at the top of this module.

    Args:
        path: The file, for its extension and for error messages.
        data: The file's content.
        exif: Whether to apply the EXIF orientation.
        channels: Number of channels to return.

    Returns:
        The pixels [H, W, C], of 8 bits or float32.

    Raises:
        BadImage: The file is empty, cut off, no image, or absurdly large.
        WrongChannels: The file can't give this number of channels.
    """
    try:
        if path.lower().endswith(".npy"):
            return _from_numpy(np.load(io.BytesIO(data), allow_pickle=False), channels)
        return _decode_image(data, exif, channels)
    except MemoryError:
        raise
    except BadImage as error:
        raise type(error)(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: not an image, or empty") from error
    except Exception as error:  # on a broken header Pillow's decoders raise exceptions of any kind
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise BadImage(f"{path}: {reason}") from error


def _decode_image(data: bytes, exif: bool, channels: int) -> np.ndarray:
    """Decode plain JPEGs to RGB with simplejpeg; decode everything else, and what it refuses, with Pillow."""
    # Plain JPEGs: simplejpeg is a third faster than Pillow and bit-equal to it (both are libjpeg-turbo). What it
    # refuses is left to Pillow, which is more forgiving.
    if channels == 3 and _is_plain_jpeg(data, exif):
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB")

    with Image.open(io.BytesIO(data)) as img:
        if img.format == "TIFF" and img.n_frames == channels > 1 and len(img.getbands()) == 1:
            return _stack_pages(img, channels)
        img.load()
        tiff_pages = img.n_frames if img.format == "TIFF" else 0
        return _to_channels(ImageOps.exif_transpose(img) if exif else img, channels, tiff_pages)


def _is_plain_jpeg(data: bytes, exif: bool) -> bool:
    """Return whether simplejpeg is to decode a file: a JPEG in YCbCr or grey, within Pillow's limit of pixels.

    With exif it must need no turning, either. Pillow decodes all others, and everything where simplejpeg is missing.
    """
    if not simplejpeg or data[:3] != b"\xff\xd8\xff":
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    if colorspace not in ("YCbCr", "Gray") or height * width > Image.MAX_IMAGE_PIXELS:
        return False
    if not exif:
        return True
    try:
        return Image.open(io.BytesIO(data)).getexif().get(Base.Orientation, 1) == 1
    except Exception:  # Pillow raises exceptions of any kind on a broken header
        return False


def _to_channels(img: Image.Image, channels: int, tiff_pages: int) -> np.ndarray:
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
        return _scale(np.asarray(img)[..., None], int32_is_16_bits=not is_tiff)
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


def _stack_pages(img: Image.Image, channels: int) -> np.ndarray:
    """Return the pages of a TIFF, of one channel each, as the channels of an array."""
    pages = []
    for number in range(channels):
        img.seek(number)
        pages.append(np.array(img))
    return _scale(np.stack(pages, axis=2))


def _from_numpy(values: np.ndarray, channels: int) -> np.ndarray:
    """Bring the array of a .npy file to [H, W, channels], its values as `_scale` returns them.

    Raises:
        WrongChannels: It has another number of channels.
    """
    if values.ndim == 2 and channels == 1:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != channels:
        raise WrongChannels(
            f"--in_chans {channels}, but this array is {list(values.shape)}: change --in_chans, or store the image as "
            f"[H, W, {channels}] or [{channels}, H, W]"
        )
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
    """Convert an image of any of Pillow's modes to 8-bit RGB, by the rules at the top of this module.

    Raises:
        ValueError: Some pixels are not finite.
    """
    if img.mode == "RGB" and not img.has_transparency_data:
        return img.copy()
    if _is_deep(img):
        return Image.fromarray(_to_8_bits(np.asarray(img), img.mode)).convert("RGB")
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

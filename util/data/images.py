"""Decode image files into arrays of pixels, by one set of rules.

Three channels (--in_chans) are 8-bit RGB:
    16-bit grey        divided by 257 (65535 becomes 255), not clipped
    32-bit, float      whole numbers of 0 to 65535 as 16-bit; 0 to 1 times 255; else the image's own range becomes 0 to
                       255
    alpha              laid over white
    palette, 1-bit, grey, CMYK and others    Pillow's conversion to RGB
    animated           the first frame
    EXIF orientation   applied on request (--exif); published results were obtained without. Pillow itself applies that
                       of a TIFF, and pillow-heif that of a HEIC, always
One channel is grey: 8 bits, or float32 from 0 to 1 where the file has 16; the values of float files and of TIFFs of
32-bit whole numbers are kept, as float32.
Four channels are 8-bit RGBA, or a file's own CMYK. Any number of channels can be read from
    .npy               [H, W, C], [C, H, W] or, of one channel, [H, W]; 8 bits, float32 from 0 to 1 where the file has
                       16 unsigned bits, else the file's values as float32
    TIFF               with as many pages of one channel each, equal in size and type, and not marked as overviews or
                       masks; values as from .npy
    TIFF               with as many samples per pixel, or of a type that Pillow can't read: as from .npy, if the package
                       tifffile is installed

What may be opened: the formats that Pillow decodes by itself (FORMATS), by a file's content, whatever its name; never
those that start another program, such as EPS. HEIC needs the package pillow-heif. Images above a number of pixels
(--max_megapixels) are refused: a small file may claim to be a huge image.

Broken metadata is ignored: if Pillow refuses a file because of it, the pixels are decoded without the metadata, and if
the orientation is unknown or unreadable, the image is not rotated. Damaged or missing pixels raise BadImage.
"""

import io
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.data import pillow, tiff
from util.data.archives import ImagePath
from util.data.channels import (
    BadImage,
    WrongChannels,
    are_channels,
    check_shape,
    from_array,
    load_npy,
    stack_pages,
    to_channels,
)
from util.data.metadata import without_metadata
from util.data.pillow import EXTENSIONS, FORMATS

try:
    import simplejpeg
except ImportError:  # there is no wheel for the platform: Pillow decodes everything
    simplejpeg = None

__all__ = ["EXTENSIONS", "FORMATS", "BadImage", "PixelSpec", "WrongChannels", "decode", "load_array"]


class PixelSpec(NamedTuple):
    """How image files become the model's input.

    Attributes:
        channels: Number of channels.
        mean: Mean of every channel: of pixels scaled to 0 to 1, or of a file's own values where these are kept.
        std: Standard deviation of every channel, likewise.
        exif: Whether to apply the EXIF orientation.
        max_megapixels: Largest image that is decoded, in millions of pixels; None: Pillow's limit, 179.
    """

    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    exif: bool = False
    max_megapixels: float | None = None

    @staticmethod
    def default_mean_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return ImageNet's mean and standard deviation: for 3 channels as they are, for 1 averaged, else None."""
        if channels == 1:
            return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else None

    @classmethod
    def from_args(cls, args: dict, channels: int) -> "PixelSpec":
        """Return the channels, mean and std that a checkpoint was trained with, from its args.

        The other fields keep their defaults. Unless both mean and std are set, for each channel, both are
        default_mean_std's, or 0 and 1 where it has none.
        """
        mean, std = args.get("mean") or (), args.get("std") or ()
        if not len(mean) == len(std) == channels:
            mean, std = cls.default_mean_std(channels) or ((0.0,) * channels, (1.0,) * channels)
        return cls(channels, tuple(mean), tuple(std))


def load_array(path: str | ImagePath, pixels: PixelSpec = PixelSpec()) -> np.ndarray:  # noqa: B008 (it never changes)
    """Read and decode an image file.

    Args:
        path: The file, which may lie in an archive.
        pixels: Channels, EXIF orientation and largest size; its mean and std are not applied.

    Returns:
        The pixels [H, W, C], of 8 bits or float32.

    Raises:
        BadImage: The file can't be read, is empty, cut off, no image, or too large.
        WrongChannels: The file can't give this number of channels.
        LocalError: The archive has changed, or is gone.
    """
    try:
        if isinstance(path, str):
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (Path takes twice as long, of a tiny image's time)
                data = file.read()
        else:
            data = path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    return decode(str(path), data, pixels)


def decode(path: str, data: bytes, pixels: PixelSpec) -> np.ndarray:
    """Decode the bytes of an image file, by the rules at the top of this module.

    Args:
        path: The file, for its extension and for error messages.
        data: The file's content.
        pixels: Channels, EXIF orientation and largest size; its mean and std are not applied.

    Returns:
        The pixels [H, W, C], of 8 bits or float32.

    Raises:
        BadImage: The file is empty, cut off, no image, or too large.
        WrongChannels: The file can't give this number of channels.
    """
    with pillow.limit_pixels(pixels.max_megapixels):
        try:
            if path.lower().endswith(".npy"):
                return from_array(load_npy(data), pixels.channels)
            return _decode_image(data, pixels)
        except MemoryError:
            raise
        except BadImage as error:
            raise type(error)(f"{path}: {error}") from error
        except UnidentifiedImageError as error:
            reason = f"a HEIC: {pillow.HEIC_REMEDY}" if pillow.is_heic(data) else "not an image, or empty"
            raise BadImage(f"{path}: {reason}") from error
        except Image.DecompressionBombError as error:
            raise BadImage(f"{path}: {pillow.describe_bomb(error)}") from error
        except Exception as error:  # on a broken header Pillow's decoders raise exceptions of any kind
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            raise BadImage(f"{path}: {reason}") from error


def _decode_image(data: bytes, pixels: PixelSpec) -> np.ndarray:
    """Decode plain JPEGs to RGB with simplejpeg; decode everything else, and what it refuses, with Pillow."""
    # Plain JPEGs: simplejpeg is a third faster than Pillow and bit-equal to it (both are libjpeg-turbo). What it
    # refuses is left to Pillow, which is more forgiving.
    if pixels.channels == 3 and _is_plain_jpeg(data, pixels.exif):
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB")

    try:
        return _decode_with_pillow(data, pixels)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except WrongChannels as error:
        return _decode_other_channels(data, pixels, error)
    except Exception as error:  # on a broken file Pillow raises exceptions of any kind
        return _decode_refused(data, pixels, error)


def _is_plain_jpeg(data: bytes, exif: bool) -> bool:
    """Return whether simplejpeg is to decode a file: a JPEG in YCbCr or grey, within the limit of pixels.

    With exif it must need no turning, either. Pillow decodes all others, and everything where simplejpeg is missing.
    """
    if not simplejpeg or data[:3] != b"\xff\xd8\xff":
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    if colorspace not in ("YCbCr", "Gray") or height * width > pillow.max_pixels():
        return False
    if not exif:
        return True
    try:
        return pillow.orientation(Image.open(io.BytesIO(data), formats=("JPEG",))) == 1
    except Exception:  # Pillow raises exceptions of any kind on a broken header
        return False


def _decode_with_pillow(data: bytes, pixels: PixelSpec) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as img:
        pillow.adapt_transparent_colour(img)
        tiff_pages = 0
        if img.format == "TIFF":
            bands = len(img.getbands())
            tiff_pages = _count_pages(data, needed=bands == 1 and pixels.channels > 1)
            if tiff_pages == pixels.channels > 1 and bands == 1 and are_channels(img, tiff_pages):
                return stack_pages(img, pixels.channels)
            # If pixels have further samples, such as infrared beside RGB, Pillow keeps only the first ones.
            if bands < pixels.channels == tiff.samples(data):
                try:
                    return _decode_with_tifffile(data, pixels)
                except WrongChannels as error:
                    if isinstance(error.__cause__, tiff.PackageMissing):
                        raise  # else the image would be another one where the package is there
        img.load()
        return to_channels(pillow.turn_upright(img) if pixels.exif else img, pixels.channels, tiff_pages)


def _count_pages(data: bytes, needed: bool) -> int:
    """Return the number of pages of a TIFF.

    Opens the file anew, since a failed count leaves Pillow's image between two pages.

    Args:
        data: The file's content.
        needed: Whether further pages may be channels. If not, and they are broken or cut off, 1 is returned.

    Raises:
        Exception: A page that is needed is broken; Pillow raises exceptions of any kind.
    """
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as img:
        try:
            return img.n_frames
        except Exception:
            if needed:
                raise
            return 1


def _decode_other_channels(data: bytes, pixels: PixelSpec, error: WrongChannels) -> np.ndarray:
    """Decode a TIFF of which Pillow sees another number of channels, if tifffile can give the one that is asked for.

    Raises:
        WrongChannels: It can't, or is not installed; or the file is no TIFF.
        Exception: The file is cut off or damaged; tifffile raises exceptions of any kind.
    """
    if samples := tiff.is_tiff(data) and tiff.samples(data):
        try:
            return _decode_with_tifffile(data, pixels)
        except WrongChannels as other:
            if samples == pixels.channels:  # it says which package is missing
                raise other from error
    raise error


def _decode_refused(data: bytes, pixels: PixelSpec, error: Exception) -> np.ndarray:
    """Decode a file that Pillow refuses: without its metadata, or with tifffile.

    Args:
        data: The file's content.
        pixels: How it is to be decoded.
        error: What Pillow said, which is raised again if nothing helps.
    """
    if bare := without_metadata(data):
        try:
            return _decode_with_pillow(bare, pixels)
        except (MemoryError, BadImage, Image.DecompressionBombError):
            raise
        except Exception:  # on a broken file Pillow raises exceptions of any kind
            pass

    # Where Pillow opens a TIFF and then fails, pixels are damaged. tifffile is for those that Pillow can't open.
    if tiff.is_tiff(data) and tiff.samples(data) and not _opens(bare or data):
        return _decode_with_tifffile(data, pixels)
    raise error


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Exception:  # Pillow raises exceptions of any kind on a broken header
        return False
    return True


def _decode_with_tifffile(data: bytes, pixels: PixelSpec) -> np.ndarray:
    try:
        values = tiff.read(data, lambda shape: check_shape(shape, pixels.channels))
    except tiff.PackageMissing as error:
        raise WrongChannels(str(error)) from error
    return from_array(values, pixels.channels)

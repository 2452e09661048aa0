"""The room where image files become pictures of 8-bit RGB, by one set of rules.

    16-bit grey        divided by 257 (65535 becomes 255), not clipped
    32-bit, float      whole numbers of 0 to 65535 as 16-bit; 0 to 1 times 255; else the image's own range becomes 0 to
                       255
    alpha              laid over white
    palette, 1-bit, grey, CMYK and others    Pillow's conversion to RGB
    animated           the first frame
    EXIF orientation   applied where asked for (--exif); published figures were made without
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

try:
    import simplejpeg
except ImportError:  # no wheel for the platform: Pillow does it all
    simplejpeg = None

ORIENTATION = Base.Orientation

# Between one and two times Pillow's limit it only warns, image by image; beyond that it refuses, as a bad image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """A file that is no readable image; the message names the file and the reason."""


def load_array(path: str, exif: bool = False) -> np.ndarray:
    """The file's pixels, [H, W, 3] RGB of 8 bits. Raises BadImage where it is empty, cut off, not an image, or absurdly
    large."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    return decode(path, data, exif)


def decode(path: str, data: bytes, exif: bool) -> np.ndarray:
    """What load_array gives, from the file's bytes.

    Plain JPEGs go through simplejpeg, a third faster than Pillow and bit-equal to it (both are libjpeg-turbo);
    everything else, and what simplejpeg refuses, goes through Pillow, which has the last word.
    """
    try:
        if simplejpeg and jpeg_size(data, exif):
            with suppress(ValueError):
                return simplejpeg.decode_jpeg(data, "RGB")
        with Image.open(io.BytesIO(data)) as img:
            img.load()
            return np.array(to_rgb(ImageOps.exif_transpose(img) if exif else img))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: not an image, or empty") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken header leads them to
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise BadImage(f"{path}: {reason}") from error


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
        turned = exif and Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) != 1
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

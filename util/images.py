"""The room where image files become pictures of 8-bit RGB, by one set of rules.

    16-bit grey        divided by 257 (65535 becomes 255), not clipped
    32-bit, float      whole numbers of 0 to 65535 as 16-bit; 0 to 1 times 255; else the image's own range becomes 0 to
                       255
    alpha              laid over white
    palette, 1-bit, grey, CMYK and others    Pillow's conversion to RGB
    animated           the first frame
    EXIF orientation   applied where asked for (--exif); published figures were made without
"""

import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Between one and two times Pillow's limit it only warns, image by image; beyond that it refuses, as a bad image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """A file that is no readable image; the message names the file and the reason."""


def load_rgb(path: str, exif: bool = False) -> Image.Image:
    """The file as an RGB picture. Raises BadImage where it is empty, cut off, not an image, or absurdly large."""
    try:
        with Image.open(path) as img:
            img.load()
            return to_rgb(ImageOps.exif_transpose(img) if exif else img)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: not an image, or empty") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken header leads them to
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise BadImage(f"{path}: {reason}") from error


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

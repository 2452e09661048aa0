"""Which of Pillow's file formats may be opened, how large an image may be, and which way up a photograph is.

Importing this module registers Pillow's formats, and silences what Pillow and tifffile say about single files: decoding
raises an exception that names the file instead.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from PIL.ExifTags import Base

try:
    import pillow_heif
except ImportError:  # an optional package
    pillow_heif = None

# Formats that are not opened: EPS and PDF are programs, which Pillow hands to Ghostscript; IPTC holds a file of any
# format, EPS included; WMF is drawn by the operating system; for the others Pillow has no decoder of its own.
REFUSED = {"EPS", "PDF", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}

# HEIC and HEIF come with pillow-heif; AVIF, too, where Pillow was built without it.
Image.init()
if pillow_heif:
    pillow_heif.register_heif_opener()
    if "AVIF" not in Image.OPEN and hasattr(pillow_heif, "register_avif_opener"):  # versions before 1.0
        pillow_heif.register_avif_opener()

FORMATS = tuple(name for name in Image.ID if name in Image.OPEN and name not in REFUSED)  # in Pillow's own order
# Pillow reads MPO, a JPEG with further pictures behind it, as JPEG.
EXTENSIONS = tuple(
    sorted({".npy", *(ending for ending, name in Image.EXTENSION.items() if name in FORMATS or name == "MPO")})
)

# What is said where the package for a file's ending is missing, and of a file with one of these types of content.
HEIC_REMEDY = "pip install pillow-heif"
HEIC_ENDINGS = (".heic", ".heif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Between one and two times MAX_IMAGE_PIXELS Pillow warns for every image (beyond, it refuses), and so it does about
# metadata that it can't make sense of.
warnings.filterwarnings("ignore", module=r"PIL\.")
for library in ("PIL", "tifffile"):
    logging.getLogger(library).setLevel(logging.CRITICAL)

# Factors by which Pillow scales the values of a PNG of other than 8 bits, by its names for their layout in the file.
SCALED = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def max_pixels() -> float:
    """Return the number of pixels above which Pillow refuses an image: twice its MAX_IMAGE_PIXELS."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


@contextmanager
def limit_pixels(max_megapixels: float | None) -> Iterator[None]:
    """Make Pillow refuse images of more pixels than this, nested ones too; None: its own limit stays in force."""
    if max_megapixels is None:
        yield
        return
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_megapixels * 1e6 / 2
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def check_size(width: int, height: int) -> None:
    """Refuse an image that Pillow does not check by itself, such as a further page of a TIFF.

    Raises:
        DecompressionBombError: It has more than `max_pixels`.
    """
    if width * height > max_pixels():
        raise Image.DecompressionBombError(f"Image size ({width * height} pixels) exceeds the limit")


def describe_bomb(error: Image.DecompressionBombError) -> str:
    """Say how large the refused image is, and which flag raises the limit that is in force now."""
    limit = f"{max_pixels() / 1e6:.4g}"
    pixels = re.search(r"(\d+) pixels", str(error))
    if not pixels:
        return f"above the limit of {limit} megapixels: raise it with --max_megapixels if the file is to be trusted"
    size = f"{math.ceil(int(pixels[1]) / 1e4) / 100:.12g}"  # rounded up, so that it is enough as a limit
    return (
        f"{size} megapixels, above the limit of {limit}: raise it with --max_megapixels {size} if the file is to be "
        "trusted"
    )


def is_heic(data: bytes) -> bool:
    """Return whether a file begins as a HEIC does, whether or not the package that reads it is installed."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS


def orientation(img: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where it is missing, unknown or unreadable."""
    try:
        value = img.getexif().get(Base.Orientation)
    except Exception:  # on broken metadata Pillow raises exceptions of any kind
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def adapt_transparent_colour(img: Image.Image) -> None:
    """Scale the transparent colour of an opened PNG as the image's values, since Pillow keeps it as it is stored."""
    colour = img.info.get("transparency")
    if img.format == "PNG" and isinstance(colour, (int, tuple)) and img.tile and img.tile[0].args in SCALED:
        factor = SCALED[img.tile[0].args]
        is_grey = isinstance(colour, int)
        img.info["transparency"] = int(colour * factor) if is_grey else tuple(int(value * factor) for value in colour)


def turn_upright(img: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a loaded image; one that needs no turning is returned as it is.

    Written by hand because ImageOps.exif_transpose also writes all EXIF anew, and fails on what it can't read.
    """
    turn = TURNS.get(orientation(img))
    return img if turn is None else img.transpose(turn)

"""Read TIFF files that Pillow can't read, such as many samples per pixel, with the optional package tifffile."""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from util.data.pillow import check_size

WIDTH, HEIGHT, BITS, STRIPS, SAMPLES, TILES, SAMPLE_FORMAT = 256, 257, 258, 273, 277, 324, 339
PAGE_KIND, PHOTOMETRIC = 254, 262
OVERVIEW, MASK = 1, 4  # bits of PAGE_KIND
KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}  # of SAMPLE_FORMAT
REMEDY = "or store the image as .npy or as a TIFF with a page per channel"


class PackageMissing(Exception):
    """An optional package is not installed; the message describes the file and names the package."""


def is_tiff(data: bytes) -> bool:
    """Return whether a file begins as a TIFF or BigTIFF does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def samples(data: bytes) -> int:
    """Return the number of samples per pixel in a TIFF's first page; 0 if that can't be found out."""
    try:
        tags = _first_page(data)
        is_page = tags[WIDTH] and tags[HEIGHT] and (STRIPS in tags or TILES in tags)
        return int(tags.get(SAMPLES, 1)) if is_page else 0
    except Exception:  # on a broken header Pillow raises exceptions of any kind
        return 0


def zero_is_white(img: Image.Image) -> bool:
    """Return whether Pillow's image is of a TIFF in which 0 is white, and the largest number black."""
    return getattr(img, "tag_v2", {}).get(PHOTOMETRIC) == 0


def is_marked(img: Image.Image) -> bool:
    """Return whether the page that Pillow's image of a TIFF is at is marked as an overview or a mask of another one.

    The mark of a page among several tells nothing: some programs put it on every page of a file, also on channels.
    """
    return bool(img.tag_v2.get(PAGE_KIND, 0) & (OVERVIEW | MASK))


def _first_page(data: bytes) -> ImageFileDirectory_v2:
    tags = ImageFileDirectory_v2(data[:16] if 43 in data[2:4] else data[:8])
    stream = io.BytesIO(data)
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _describe(data: bytes) -> str:
    """Return the words for a TIFF whose `samples` are known: their number and type."""
    tags, count = _first_page(data), samples(data)
    kind = KINDS.get(np.ravel(tags.get(SAMPLE_FORMAT, 1))[0], "unknown ")
    bits = np.ravel(tags.get(BITS, 1))[0]
    return f"a TIFF of {count} {'sample' if count == 1 else 'samples'} per pixel, {kind}{bits}"


def read(data: bytes, check_shape: Callable[[tuple[int, ...]], None]) -> np.ndarray:
    """Read a TIFF's first series of pages (mostly the only one) with tifffile.

    Args:
        data: The file, a TIFF whose `samples` are known.
        check_shape: Is called with the array's shape before any pixel is read; raises if that can't be used.

    Returns:
        The array in the file's own type: [H, W, C], [C, H, W], [H, W] or whatever else the file holds.

    Raises:
        PackageMissing: tifffile is missing, or the package that it needs for this compression.
        DecompressionBombError: A page has more pixels than allowed.
        ValueError: The file is cut off.
        Exception: tifffile can't read it, either.
    """
    try:
        import tifffile
    except ImportError as error:
        raise PackageMissing(f"{_describe(data)}, which Pillow can't read: pip install tifffile, {REMEDY}") from error

    # By default tifffile would follow the names of other files that these three kinds may hold.
    with tifffile.TiffFile(io.BytesIO(data), is_ome=False, is_mmstack=False, is_ndtiff=False) as file:
        series = file.series[0]
        check_size(series.keyframe.imagewidth, series.keyframe.imagelength)
        check_shape(series.shape)
        _check_whole(series, len(data))
        try:
            values = series.asarray(maxworkers=1)  # loader processes share the cores already
        except ValueError as error:
            package = re.search("requires the '(imagecodecs)' package", str(error))
            if not package:
                raise
            compression = getattr(series.keyframe.compression, "name", series.keyframe.compression)
            raise PackageMissing(
                f"{_describe(data)}, compressed by {compression}, which Pillow can't read: pip install {package[1]}, "
                f"{REMEDY}"
            ) from error
        white_is_zero = series.keyframe.photometric == 0 and values.dtype in (bool, np.uint8, np.uint16)
        return ~values if white_is_zero else values


def _check_whole(series: object, length: int) -> None:
    """Check that all pixels of tifffile's series lie within the file, since tifffile fills up what is missing.

    Raises:
        ValueError: The file is cut off.
    """
    ends = [0]
    for page in filter(None, series.pages):
        ends += [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if series.dataoffset is not None:
        ends.append(series.dataoffset + series.nbytes)
    elif series.keyframe.compression == 1:  # none: strips and tiles are as long as what they hold
        held = sum(sum(page.databytecounts) for page in filter(None, series.pages))
        ends.append(length + max(0, series.nbytes - held))
    if max(ends) > length:
        raise ValueError(f"the file is cut off: {max(ends) - length} bytes of pixels are missing")

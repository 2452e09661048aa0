"""Images to be packed from folders, and from tar archives that are read in place; what all sources share."""

import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.data.archive_forms import common_prefix, list_members
from util.data.listing import Listing
from util.data.splits import ENDINGS, NAMES, SPLITS, is_image
from util.errors import UserError
from util.packing.shards import PackedImages
from util.words import join_names

# What libraries raise when a file is damaged or cut off.
DAMAGE = (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def check_images(images: PackedImages, sources: list[Path]) -> PackedImages:
    """Check that images belong to one split, add notices on what may be a surprise, and return them.

    Raises:
        UserError: There are none, or their folders have the names of several splits.
    """
    where = join_names(map(str, sources), 3)
    if not images.names:
        raise UserError(f"no images in {where}. {'; '.join([*images.notices, ENDINGS])}")

    # A single folder around everything, as a data set's name, may hold splits, or the true classes.
    groups = list(NAMES.values())
    folders = set(images.classes)
    if len(images.classes) == 1 and images.classes != [""]:
        inner = {name.split("/")[1] if name.count("/") > 1 else "" for name in images.names}
        folders |= inner
        if "" not in inner and not inner <= set.union(*groups):
            images.notices.append(
                f"all images lie in folders of {images.classes[0]}, which is taken as the only class: if these folders "
                f"are the classes, unpack archives, and pack {images.classes[0]} by itself"
            )
    found = [group & folders for group in groups]
    if all(found):
        raise UserError(
            f"{where} holds several splits ({join_names(sorted(set.union(*found)))}), not classes: unpack archives, "
            "name the folders train and val, and pack the folder of both, or one of them"
        )
    if images.classes != sorted(images.classes):
        images.notices.append(
            "classes are numbered in the order of their names from now on: a model that was trained with other numbers "
            "does not fit"
        )
    return images


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors by which libraries say that a file can't be read, or is damaged, into a UserError."""
    try:
        yield
    except NotImplementedError as error:  # a compression that zipfile does not know
        raise UserError(f"{path} can't be read ({error}): unpack it, and pack the folder") from error
    except DAMAGE as error:
        # The system's own errors have a number; libraries say with others that a checksum is wrong.
        if isinstance(error, OSError) and error.errno:
            reason = f"cannot read {path}: {error.strerror}. Check the file and its permissions"
        else:
            reason = f"{path} is damaged or cut off ({error}): copy or download it again"
        raise UserError(reason) from error


def list_tars(archives: list[Path], alone: bool) -> Listing:
    """List the images in tar archives, as training would if they were a split.

    Args:
        archives: The archives.
        alone: There is but one, whose name is no class.

    Raises:
        BadArchive: An archive can't be read, or has none of the forms that training reads.
    """
    how = {"classes_optional": True, "single": alone, "to_pack": True}
    listing = list_members(archives, archives[0].absolute().parent.name, is_image, **how)
    if len(listing.classes) > 1 or listing.classes == [""]:
        return listing

    # What looks like a single class may be the folder of the split.
    names = [listing.name(index) for index in range(len(listing))]
    for word in (*SPLITS, archives[0].stem):
        if droppable_prefix(names, [word]):
            return list_members(archives, word, is_image, **how)
    return listing


def droppable_prefix(names: list[str], words: list[str]) -> str:
    """Return the folders that all names begin with, up to one that is one of the words, if these are no classes.

    Where the word is not that of a split, what remains must have folders.
    """
    for word in words:
        prefix = common_prefix(names, word)
        if prefix and (word in SPLITS or all("/" in name[len(prefix) :] for name in names)):
            return prefix
    return ""


def from_listing(listing: Listing, sources: list[Path]) -> PackedImages:
    """Return the images of a listing, for packing.

    Raises:
        UserError: A file can't be read; or what check_images raises.
    """

    def read(numbers: list[int]) -> Iterator[bytes]:
        """Yield the contents of the images with these numbers, as PackedImages.read does."""
        for number in numbers:
            path = listing[number][0]
            path = Path(path) if isinstance(path, str) else path
            with readable(path):
                data = path.read_bytes()
            yield data

    names = [listing.name(number) for number in range(len(listing))]
    if listing.members:
        sizes, names = listing.members.sizes.tolist(), _make_unique(names, listing)
    else:
        sizes = [_file_size(path) for path, _ in listing]
    notices = [f"left out: {listing.left_out}"] if str(listing.left_out) else []
    return check_images(PackedImages(names, sizes, list(listing.classes), read, notices), sources)


def _file_size(path: str) -> int:
    with readable(Path(path)):
        return Path(path).stat().st_size


def _make_unique(names: list[str], listing: Listing) -> list[str]:
    """Return names of images in archives, those that occur several times with their archive's name as a folder.

    WebDataset's names are unique within an archive only.
    """
    repeated = {name for name, times in Counter(names).items() if times > 1}
    if not repeated:
        return names
    stems = [Path(archive).stem for archive in listing.members.archives]
    unique = []
    for name, archive_id in zip(names, listing.members.archive_ids.tolist(), strict=True):
        folder, slash, file = name.rpartition("/")
        unique.append(f"{folder}{slash}{stems[archive_id]}/{file}" if name in repeated else name)
    return unique

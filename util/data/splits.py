"""Find a split in --data_path, as folders or as archives, and list its images.

    data_path/train/<class>/*.jpg       folders
    data_path/train.tar, train/*.tar    archives (their forms: util/data/archive_forms.py)

The same for val, in whose place some images of train can be held out (util/data/holdout.py). Pre-training also takes
images without class folders, in data_path/train, or images and archives in data_path where there is no such split.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from util.data.archive_forms import list_members
from util.data.archive_index import load_index
from util.data.holdout import choose_held_out
from util.data.images import EXTENSIONS
from util.data.listing import Listing, list_files, read_folder
from util.data.tar import BadArchive
from util.errors import UserError
from util.words import join_names

# Names that folders or archives beside a missing one often have instead.
OTHER_NAMES = {"train": ("training", "train2017"), "val": ("valid", "validation", "test", "testing", "eval", "dev")}
ENDINGS = (
    f"Image files end in .jpg, .png, .tif, .webp, .npy or one of {len(EXTENSIONS) - 5} other endings"  # for messages
)
SPLITS = tuple(OTHER_NAMES)
NAMES = {split: {split, *OTHER_NAMES[split]} for split in SPLITS}  # all names of each split
ARCHIVE = ".tar"
# Endings of archives that can't be read in place.
OTHER_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip")


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files (.DS_Store, ._a.jpg) are not."""
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


@dataclass(frozen=True)
class DataSpec:
    """The images of a run, and how they are divided.

    Attributes:
        path: Folder that holds the splits train and val.
        val_fraction: Share of the images of train that is held out and used as val; 0: val is read.
        val_seed: Seed that determines which images are held out.
        class_names: Names of the class folders in the order of the classes' numbers; None: sorted.
    """

    path: str
    val_fraction: float = 0.0
    val_seed: int = 0
    class_names: list[str] | None = None


class Source(NamedTuple):
    """Where a split lies.

    Attributes:
        root: Its folder, or its only archive.
        archives: Its archives; empty: it lies in folders.
        apart: Names of folders in the root that belong to other splits, and are not listed.
    """

    root: Path
    archives: list[Path]
    apart: tuple[str, ...] = ()


def find_split(data_path: str, split: str, whole_folder: bool = False) -> Source | None:
    """Find a split, and return None if it is missing.

    Args:
        data_path: Folder that holds the splits.
        split: Name of the split, train or val.
        whole_folder: Where there is no such split, take the images or archives in data_path itself.

    Raises:
        UserError: A folder can't be read, holds archives beside other things, or archives that can't be read in place.
    """
    folder = Path(data_path) / split
    if folder.is_dir():
        return source_at(folder)
    for ending in (ARCHIVE, *OTHER_ARCHIVES):
        if (file := Path(data_path) / f"{split}{ending}").is_file():
            return source_at(file)
    if not whole_folder:
        return None

    # In data_path itself, the folder or archive of another split does not count.
    folders, files = read_folder(data_path)
    other = set().union(*(names for key, names in NAMES.items() if key != split))
    archives = [Path(data_path) / name for name in files if name.lower().endswith(ARCHIVE)]
    archives = [archive for archive in archives if archive.stem.lower() not in other]
    images = list(filter(is_image, files))
    if archives and images:
        raise UserError(_describe_mixture(data_path, archives, "images", images))
    others = [archive.name for archive in archives if other.intersection(re.split("[^a-z0-9]+", archive.stem.lower()))]
    if others and len(others) < len(archives):
        raise UserError(
            f"{data_path} holds archives of several splits, such as {others[0]}: move those of training into "
            f"{Path(data_path) / 'train'} and those of validation into {Path(data_path) / 'val'}"
        )
    if not (archives or images):
        return None
    apart = sorted(name for name, _ in folders if name.lower() in other)
    return Source(Path(data_path), archives, tuple(apart))


def source_at(path: Path) -> Source:
    """Return the split that a folder or an archive holds; raises what find_split raises."""
    if not path.is_dir():
        _refuse_other_archives([path])
        return Source(path, [path])
    folders, files = read_folder(str(path))
    archives = [path / name for name in files if name.lower().endswith(ARCHIVE)]
    images = list(filter(is_image, files))
    if not (folders or images):
        _refuse_other_archives([path / name for name in files])
    elif archives:
        kind, beside = ("folders", [name for name, _ in folders]) if folders else ("images", images)
        raise UserError(_describe_mixture(path, archives, kind, beside))
    return Source(path, archives)


def _describe_mixture(path: str | Path, archives: list[Path], kind: str, beside: list[str]) -> str:
    """Return a message about a folder that holds archives and other things.

    Args:
        path: The folder.
        archives: The archives.
        kind: What the other things are, as a word in the plural.
        beside: Their names.
    """
    return (
        f"{path} holds archives ({join_names((file.name for file in archives), 3)}) beside {kind} "
        f"({join_names(sorted(beside), 3)}), and only one of the two can be read: move the others elsewhere"
    )


def _refuse_other_archives(files: list[Path]) -> None:
    """Raise a BadArchive for the first of some files that is an archive of another kind than plain tar."""
    for file in files:
        if file.name.lower().endswith(OTHER_ARCHIVES):
            load_index(file)  # says what to do with the kind that it is
            raise BadArchive(f"{file} is a plain tar archive: rename it so that it ends in {ARCHIVE}")


def holds_archives(folder: Path) -> bool:
    """Return whether a folder holds archives, and neither folders nor images."""
    folders, files = read_folder(str(folder))
    return any(name.lower().endswith(ARCHIVE) for name in files) and not folders and not any(map(is_image, files))


def list_split(source: Source, split: str, classes_optional: bool = False) -> Listing:
    """List the images of a split.

    Args:
        source: Where the split lies.
        split: Name of the split, train or val.
        classes_optional: Also accept images without classes; all then count as one class.

    Raises:
        UserError: There are no class folders, or an archive can't be used.
    """
    if source.archives:
        single = not source.root.is_dir()
        return list_members(source.archives, split, is_image, classes_optional=classes_optional, single=single)

    # One class, "", is the folder itself.
    folders, files = read_folder(str(source.root))
    classes = sorted(name for name, _ in folders)
    if classes_optional and any(map(is_image, files)):
        classes = [""]
    if not classes:
        raise UserError(f"{source.root} has no class folders: it must hold <class>/<images>, or archives of them")
    found = list_files(str(source.root), classes, is_image, source.apart)
    found.mixed = classes == [""] and b"/" in found.names.tobytes()
    return found


def list_part(data: DataSpec, split: str, classes_optional: bool = False) -> tuple[Source, Listing]:
    """List the images of a split, or, where images are held out, those of train that are, or are not, held out.

    Args:
        data: The run's images.
        split: Name of the split, train or val.
        classes_optional: Also accept images without classes, which then all count as one class; where there is no such
            split, take the images of data.path itself.

    Raises:
        UserError: The split is missing, has no classes or other ones than data.class_names, or can't be read.
    """
    stored = "train" if data.val_fraction else split
    source = find_split(data.path, stored, classes_optional)
    if source is None:
        place = Path(data.path).absolute()
        if place.name in SPLITS and (place.parent / stored).is_dir():
            raise UserError(f"--data_path {data.path} is a split itself: pass --data_path {Path(data.path).parent}")
        instead = ", or --val_fraction 0.1 holds out a tenth of the training images" if stored == "val" else ""
        raise UserError(
            f"no folder {Path(data.path) / stored}: --data_path must hold {stored}/<class>/<images>, or {stored}.tar"
            f"{similar(data.path, stored) or _class_folders(data.path, stored)}{instead}"
        )
    # Whatever becomes of the working directory, loader processes find the archives.
    source = source._replace(archives=[archive.absolute() for archive in source.archives])
    found = list_split(source, stored, classes_optional)

    if data.val_fraction:
        held_out = choose_held_out(found.names_as_bytes(), found.targets, data.val_fraction, data.val_seed)
        found = found.select(held_out if split == "val" else ~held_out)
    if data.class_names:
        unknown = sorted(set(found.classes) - set(data.class_names))
        if unknown:
            raise UserError(
                f"--class_names names {len(data.class_names)} classes, not these folders in {source.root}: "
                f"{join_names(unknown)}. It must name every class folder, in the order of the classes' numbers"
            )
        found = found.renumber(data.class_names)
    return source, found


def _class_folders(data_path: str, split: str) -> str:
    """Return a phrase on folders that may be those of classes, where a split is missing; "" if there are none."""
    folders, _ = read_folder(data_path)
    names = sorted(name for name, _ in folders if name.lower() not in set().union(*NAMES.values()))
    if not names:
        return ""
    return f" (it holds {join_names(names, 3)}: if these are the classes, move them into {Path(data_path) / split})"


def similar(data_path: str, split: str) -> str:
    """Return a phrase on the folders and archives that may be meant where a split is missing; "" if there are none."""
    folders, files = read_folder(data_path)
    meant = NAMES[split]
    names = [name for name, _ in folders if name.lower() in meant]
    names += [name for name in files if name.lower() in [f"{other}{ARCHIVE}" for other in meant]]
    if not names:
        return ""
    link = f"{split}{ARCHIVE}" if all(name.endswith(ARCHIVE) for name in names) else split
    return f" (there is {join_names(sorted(names))}: rename it, or link {link} to it)"

"""Read the labels of WebDataset: a .cls, or a .json with "label", beside each image, of the same name to the first dot.

A label is a number from 0, or a name. The names of numbers are the lines of classes.txt beside the archives, or in
data_path, else class_<number>.
"""

import json
import re
from collections import Counter
from contextlib import suppress

from util.data.archives import Files
from util.data.tar import BadArchive
from util.words import join_names

LABELS = (".cls", ".json")  # endings of the members that hold a sample's class
CLASS_NAMES = "classes.txt"
MOST_CLASSES = 10**6  # a greater number is no class


def sample_key(name: str) -> str:
    """Return the sample of its archive that a file belongs to, as WebDataset tells: its name up to the first dot."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _keys(files: Files) -> list[tuple[int, str]]:
    """Return the sample that each file belongs to, with the number of its archive."""
    return [(number, sample_key(name)) for number, name in zip(files.archive_ids.tolist(), files.names, strict=True)]


def find_labels(images: Files, labels: Files) -> list[int | None]:
    """Return for each image the index of its label among the labels, None for one without; [] if none has any."""
    # Of a sample with both, .cls is taken.
    order = sorted(range(len(labels.names)), key=lambda number: labels.names[number].endswith(LABELS[0]))
    keys = _keys(labels)
    by_key = {keys[number]: number for number in order}
    found = [by_key.get(key) for key in _keys(images)] if by_key else []
    return found if any(number is not None for number in found) else []


def _check_samples(images: Files, labels: Files) -> None:
    """Raise a BadArchive if two images, or two labels of one kind, belong to one sample."""
    kinds = [[number for number, name in enumerate(labels.names) if name.endswith(ending)] for ending in LABELS]
    for files in (images, *map(labels.pick, kinds)):
        first: dict[tuple[int, str], int] = {}
        for number, key in enumerate(_keys(files)):
            if first.setdefault(key, number) != number:
                raise BadArchive(
                    f"{files.path(first[key])} and {files.path(number)} belong to one sample, since their names up to "
                    "the first dot are one: pack them anew, with one image and one label per sample"
                )


def refuse_labels(images: Files, folders: list[str], labels: Files) -> None:
    """Raise a BadArchive for a label beside an image in a folder: which of both is its class is not clear.

    A .json may also hold other things, or repeat the folder's name. Of each folder the first one is read.

    Args:
        images: The images.
        folders: Folder of each.
        labels: Members that may hold labels.
    """
    read = set()
    for folder, number in zip(folders, find_labels(images, labels), strict=False):
        if number is None:
            continue
        unclear = labels.names[number].endswith(LABELS[0])
        if not unclear and folder not in read:
            read.add(folder)
            with suppress(BadArchive):  # it holds no class
                label = _read_label(labels, number)
                unclear = label is not None and str(label) != folder
        if unclear:
            raise BadArchive(
                f"{labels.path(number)} is the label of an image in a folder, which stands for a class by itself: pack "
                "the samples anew without folders"
            )


def read_classes(
    images: Files, labels: Files, found: list[int | None], split: str, classes_optional: bool
) -> tuple[list[str], list[int]] | None:
    """Read the labels of images.

    Args:
        images: The images.
        labels: Members that may hold labels.
        found: What `find_labels` found.
        split: Name of the split.
        classes_optional: The images need no classes.

    Returns:
        The names of the classes, and the number of each image's class; None with `classes_optional` if not every image
        has a label that is a class.

    Raises:
        BadArchive: Labels can't be read, are missing, or are no classes.
    """
    # Pre-training needs no classes: labels that are none, such as lists of several, do not matter there.
    try:
        if not classes_optional:
            _check_samples(images, labels)
        values = [None if number is None else _read_label(labels, number) for number in found]
    except BadArchive:
        if not classes_optional:
            raise
        return None
    if None in values:
        if classes_optional:
            return None
        raise BadArchive(
            f'{images.path(values.index(None))} has no label: each image needs a .cls, or a .json with "label", of the '
            "same name"
        )

    # Numbers are the classes' own, names are numbered in sorted order.
    kinds = {type(value) for value in values}
    if kinds == {int}:
        return _class_names(images, max(values) + 1, split), values
    if kinds == {str}:
        classes = sorted(set(values))
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, [numbers[value] for value in values]
    raise BadArchive(
        f"some labels are numbers and some are names in {join_names(map(str, images.archives), 3)}, such as "
        f"{next(value for value in values if isinstance(value, str))!r}: pack them anew with labels of one kind"
    )


def _read_label(labels: Files, number: int) -> int | str | None:
    """Return the class that a member states, by its number or name; None if a .json states none.

    Raises:
        BadArchive: It can't be read, or is no class.
    """
    path = labels.path(number)
    try:
        data = labels.read(number)
        if len(data) < labels.sizes[number]:
            raise ValueError("it is cut off")
        text = data.decode()
        if path.endswith(".json"):
            entries = json.loads(text)
            label = entries.get("label", entries.get("cls")) if isinstance(entries, dict) else None
        else:
            label = text.strip()
    except (OSError, ValueError, RecursionError) as error:
        raise BadArchive(f"{path} can't be read as a label: {error}") from error
    if label is None:
        return None

    # A number may be written as text, or with a point.
    if isinstance(label, str) and re.fullmatch(r"-?\d{1,18}", label) or isinstance(label, float) and label.is_integer():
        label = int(label)
    if type(label) is int and 0 <= label < MOST_CLASSES:
        return label
    if isinstance(label, str) and label not in ("", ".", "..") and not re.search("[/\0\ud800-\udfff]", label):
        return label
    raise BadArchive(
        f"{path} has the label {label!r:.40}, which is no class: give a number from 0 up, or a name without /"
    )


def _class_names(images: Files, count: int, split: str) -> list[str]:
    """Return the names of numbered classes: the lines of classes.txt, or class_0, class_1, ...

    Args:
        images: The images; classes.txt lies beside their archives or, where these are in a folder of the split's name,
            beside that.
        count: Smallest number of classes.
        split: Name of the split.

    Raises:
        BadArchive: classes.txt has too few lines, or lines that are no names.
    """
    folder = images.archives[0].absolute().parent
    candidates = [folder, folder.parent] if folder.name == split else [folder]
    file = next((place / CLASS_NAMES for place in candidates if (place / CLASS_NAMES).is_file()), None)
    if file is None:
        return [f"class_{number}" for number in range(count)]
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise BadArchive(f"cannot read {file}: {error}") from error
    names = [name.strip() for name in names]
    if len(names) < count:
        raise BadArchive(
            f"{file} names {len(names)} classes, and there is a label {count - 1}: a line per class is needed"
        )
    twice = [name for name, times in Counter(names).items() if times > 1 or not name or "/" in name]
    if twice:
        raise BadArchive(
            f"{file} needs a name without / per line, each once: {join_names(map(repr, twice), 3)} is wrong"
        )
    return names

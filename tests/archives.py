"""Helpers of the tests: they pack folders of images into archives of every form that training reads, and list them."""

import io
import random
import shutil
import tarfile
from pathlib import Path

from PIL import Image

from util.data import archive_index, datasets, splits
from util.data.images import PixelSpec
from util.data.splits import DataSpec


def png(value: int = 9, size: int = 8, form: str = "png") -> bytes:
    """Return the file of a square grey picture."""
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, form)
    return buffer.getvalue()


PNG = png()
Listed = tuple[list[str], list[tuple[str, int, bytes]]]  # classes; name, class and content of each image


def contents(source: splits.Source, split: str, classes_optional: bool = False) -> Listed:
    """Return the classes of a split, and (name, class, content) of each of its images, in order."""
    found = splits.list_split(source, split, classes_optional)
    contents = [Path(path).read_bytes() if isinstance(path, str) else path.read_bytes() for path, _ in found]
    return found.classes, list(zip(map(found.name, range(len(found))), found.targets.tolist(), contents, strict=True))


def listed(data: Path, split: str = "train", classes_optional: bool = False) -> Listed:
    """Return what `contents` returns of a split in a data folder."""
    return contents(splits.find_split(str(data), split, classes_optional), split, classes_optional)


def opened(data: Path, split: str = "train", kind: type = datasets.Images, **more: object) -> datasets.Images:
    """Open a split as a run does; `more` are arguments of open_split."""
    return datasets.open_split(kind, DataSpec(str(data)), split, None, PixelSpec(), **more)


def add(tar: tarfile.TarFile, name: str, data: bytes, **header: object) -> None:
    """Add a file to an open archive; `header` are attributes of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write(path: Path, members: dict[str, bytes], **options: object) -> Path:
    """Write an archive of these members, in their order; `options` are those of tarfile.open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def good(path: Path) -> Path:
    """Write an archive of two images in two classes."""
    return write(path, {"a/1.png": PNG, "b/2.png": PNG * 9})


def sample(key: str, label: int | str | bytes, ending: str = "cls") -> dict[str, bytes]:
    """Return the two members of a sample of WebDataset: an image and its label."""
    return {f"{key}.png": PNG, f"{key}.{ending}": label if isinstance(label, bytes) else str(label).encode()}


def raw(name: str, data: bytes, kind: bytes = b"0", size: int | None = None) -> bytes:
    """Return a member's header and content; `size` is what the header states instead of the content's size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def save_index(archive: Path) -> None:
    """Write an archive's index beside it."""
    with archive.with_name(f"{archive.name}.index").open("wb") as file:
        archive_index.write_index(archive, file)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder of class folders, by <class>/<file>."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*"))}


def pack_one(files: dict[str, bytes], split: Path) -> None:
    """Write split.tar, as `tar cf train.tar train` does."""
    write(split.with_suffix(".tar"), {f"{split.name}/{name}": data for name, data in files.items()})


def pack_shards(files: dict[str, bytes], split: Path, shards: int = 8) -> None:
    """Write shards of images from all classes, in random order."""
    names = random.Random(1).sample(sorted(files), len(files))
    for number in range(shards):
        write(split / f"shard-{number:03d}.tar", {f"./{name}": files[name] for name in names[number::shards]})


def pack_classes(files: dict[str, bytes], split: Path) -> None:
    """Write an archive per class."""
    for name in {name.split("/")[0] for name in files}:
        members = {path.split("/")[1]: data for path, data in files.items() if path.startswith(f"{name}/")}
        write(split / f"{name}.tar", members)


def pack_webdataset(files: dict[str, bytes], split: Path, shards: int = 3) -> None:
    """Write shards of WebDataset, half of the labels as .cls and half as .json, and classes.txt."""
    classes = sorted({name.split("/")[0] for name in files})
    names = random.Random(2).sample(sorted(files), len(files))
    for shard in range(shards):
        members = {}
        for name in names[shard::shards]:
            owner, file = name.split("/")
            label, stem = classes.index(owner), file.partition(".")[0]
            if label % 2:
                members[f"{stem}.json"] = f'{{"label": {label}, "caption": "{owner}"}}'.encode()
                members[file] = files[name]
            else:
                members[file] = files[name]
                members[f"{stem}.cls"] = f"{label}\n".encode()
        write(split / f"{shard:05d}.tar", members)
    (split / "classes.txt").write_text("\n".join(classes) + "\n")


FORMS = {"one": pack_one, "shards": pack_shards, "classes": pack_classes, "webdataset": pack_webdataset}


def pack(data: Path, packed: Path, form: str) -> Path:
    """Pack train/ and val/ of a data folder into archives of a form; return the folder of the archives."""
    shutil.rmtree(packed, ignore_errors=True)
    for split in ("train", "val"):
        FORMS[form](read_folder(data / split), packed / split)
    return packed

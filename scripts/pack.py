"""Pack the images of a split into tar archives of limited size (shards), which training reads in place.

    python scripts/pack.py imagenet --output packed             a folder that holds train/ and val/
    python scripts/pack.py imagenet/val --output packed/val     a folder of class folders, or of images alone
    python scripts/pack.py train.zip --output packed/train      a .zip, or a compressed tar (.tar.gz, .tar.xz, ...)
    python scripts/pack.py data/train-*.parquet --output packed/train
                                                                parquet files of the Hugging Face hub (pip install
                                                                pyarrow)
    python scripts/pack.py old/*.tar --output packed/train      tar archives, WebDataset's too, into class folders
    python scripts/pack.py --index train.tar                    write train.tar.index beside an existing archive

The output is DIR/shard-00000.tar and so on, with an index beside each. Files are packed as they are, never decoded. A
shard is read back and compared before it gets its name. A run that was interrupted goes on with the first missing
shard, and one that is complete writes nothing; a folder that holds other shards is left alone. Compressed tars and
parquet files are read twice, the first time for the images' sizes.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util import errors
from util.command_line import Parser
from util.data import splits, tar
from util.data.listing import Listing, exists, read_folder
from util.data.splits import ARCHIVE, OTHER_ARCHIVES, SPLITS, is_image
from util.disk import unwritable
from util.errors import UserError
from util.packing.parquet import read_parquets
from util.packing.shards import PackedImages
from util.packing.sources import check_images, from_listing, list_tars, readable
from util.packing.streams import OPENERS, read_compressed, read_zips
from util.packing.writing import index_archives, pack_split
from util.words import join_names

PARQUET = ".parquet"
KINDS = {b"PK": "zip", b"PAR1": "parquet"} | dict.fromkeys(OPENERS, "compressed tar")  # by a file's first bytes
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1024


def find_sources(sources: list[Path], output: Path) -> Iterator[tuple[Path, PackedImages]]:
    """Yield the folder to write, and the images to pack into it, for each split in the sources.

    Args:
        sources: A folder, or archives, or folders of archives.
        output: Folder to write, or that of train/ and val/.

    Raises:
        UserError: The sources can't be read, are of several kinds, or hold no images.
    """
    if missing := [str(path) for path in sources if not exists(path)]:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    files = [file for source in sources for file in _archives_in(source)]
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or (kinds == {"folder"} and len(files) > 1):
        raise UserError(
            f"{join_names(map(str, sources), 3)} can't be packed together: name one folder, or archives of one kind"
        )

    # Only a folder may hold two splits.
    kind = kinds.pop()
    if kind == "folder":
        for name, source in _splits_in(files[0]):
            folder = output / name
            _refuse_overlap(source.root, folder)
            listing = splits.list_split(source, name or source.root.name, classes_optional=True)
            _refuse_mixture(listing)
            yield folder, from_listing(listing, [source.root])
    elif kind == "tar":
        alone = files == sources and len(files) == 1
        yield output, from_listing(list_tars(files, alone), sources)
    else:
        read = {"zip": read_zips, "compressed tar": read_compressed, "parquet": read_parquets}[kind]
        yield output, check_images(read(files), sources)


def _refuse_mixture(listing: Listing) -> None:
    """Raise a UserError for images beside folders of images: to keep the one, packing would lose the other."""
    if listing.mixed:
        loose = [name for name in map(os.fsdecode, listing.names_as_bytes()) if "/" not in name]
        raise UserError(
            f"{listing.root} holds images ({join_names(loose, 3)}) beside folders of images: move them into a folder "
            "of their own there, which is a class then, or elsewhere"
        )


def _archives_in(path: Path) -> list[Path]:
    """Return the archives that a folder holds and nothing else; else the path itself."""
    if not path.is_dir() or any(splits.find_split(str(path), split) for split in SPLITS):
        return [path]
    folders, files = read_folder(str(path))
    parquets = [path / name for name in files if name.lower().endswith(PARQUET)]
    if parquets and not folders and not any(is_image(name) or name.lower().endswith(ARCHIVE) for name in files):
        return parquets
    return splits.source_at(path).archives or [path]


def _kind(path: Path) -> str:
    """Return the kind of a source, by its content: "folder", "tar", "zip", "compressed tar" or "parquet".

    Raises:
        UserError: It can't be read, or is none of them.
    """
    if path.is_dir():
        return "folder"
    with readable(path), path.open("rb") as file:
        start = file.read(tar.BLOCK)
    with suppress(ValueError):
        tar.parse(start)
        return "tar"  # though its first member's name may begin with PK
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return kind
    if path.name.lower().endswith(OTHER_ARCHIVES):
        splits.source_at(path)  # says what is wrong with it
    if not path.name.lower().endswith(ARCHIVE):
        raise UserError(f"{path} is no archive that can be read: download or copy it again, or name another")
    return "tar"


def _splits_in(folder: Path) -> list[tuple[str, splits.Source]]:
    """Return the splits train and val of a folder, or, as "", the folder itself; raises what find_split raises."""
    # Images or archives beside val are those of train.
    val = splits.find_split(str(folder), "val")
    train = splits.find_split(str(folder), "train", whole_folder=val is not None)
    found = [(name, source) for name, source in (("train", train), ("val", val)) if source]

    # What else is there?
    folders, files = read_folder(str(folder))
    others = {name for name, _ in folders} | {name for name in files if name.lower().endswith(ARCHIVE)}
    for _, source in found:
        others -= {source.root.name, *(archive.name for archive in source.archives)}
        if source.root == folder and not source.archives:
            others &= set(source.apart)  # all other folders are listed with the images
    # A single folder named like a split is one if it holds class folders, and no other split lies beside it under
    # another name; else it is a class among others.
    other_names = set().union(*splits.OTHER_NAMES.values())
    single = len(found) == 1 and bool(others)
    if not found or (single and (others & other_names or not _holds_class_folders(found[0][1]))):
        return [("", splits.source_at(folder))]
    if single:
        name, source = found[0]
        if classes := [other for other in sorted(others) if _holds_images(folder / other)]:
            raise UserError(
                f"{folder} holds {name} beside folders of images ({join_names(classes, 3)}): pack {source.root} by "
                "itself, or rename it if it is one of the classes"
            )
    if others:
        print(f"notice: not packed: {join_names(sorted(others), 3)} in {folder}", file=sys.stderr)
    return found


def _holds_class_folders(source: splits.Source) -> bool:
    """Return whether a source is a folder that holds folders, and no images directly."""
    if source.archives:
        return False
    folders, files = read_folder(str(source.root))
    return bool(folders) and not any(map(is_image, files))


def _holds_images(path: Path) -> bool:
    """Return whether a path is a folder that holds images directly."""
    return path.is_dir() and any(map(is_image, read_folder(str(path))[1]))


def _refuse_overlap(source: Path, output: Path) -> None:
    """Raise a UserError if one of two folders lies in the other: shards would be taken for images, or the reverse."""
    source, output = source.resolve(), output.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise UserError(f"--output {output} and {source}, which is to be packed, lie in each other: choose another one")


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as 500M, 1G or 1000000 states; K, M, G and T are powers of 1024.

    Raises:
        UserError: It states none, or 0.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if not match or not int(match[1]):
        raise UserError(f"--shard_size {text} is no size: give one like 500M, 1G or a number of bytes")
    return int(match[1]) * 1024 ** UNITS[match[2]]


def main(argv: list[str] | None = None) -> None:
    """Pack one split or two, or write indexes (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sources", metavar="SOURCE", type=Path, nargs="+", help="a folder, or archives, or folders of archives")
    add("--output", type=Path, metavar="DIR", help="folder of the shards; where the source has two splits, of theirs")
    add("--shard_size", default="1G", metavar="SIZE", help="largest size of a shard, as 500M, 1G or bytes")
    index_help = "only write the index beside each SOURCE, an archive or a link to one, unless it is current"
    add("--index", action="store_true", help=index_help)
    args = parser.parse_args(argv)
    if bool(args.output) == args.index:
        raise UserError("give --output DIR to pack, or --index to write indexes beside archives")
    if args.index:
        index_archives(args.sources)
        return

    # What is there may be complete, and need no writing.
    size = parse_size(args.shard_size)
    if not args.output.exists() and (reason := unwritable(args.output)):
        raise UserError(f"--output {args.output} can't be written to: {reason}")
    for folder, images in list(find_sources(args.sources, args.output)):
        pack_split(images, folder, size)


if __name__ == "__main__":
    errors.run(main)

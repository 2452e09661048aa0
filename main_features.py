"""Extract features of images with the encoder of any checkpoint, without masking.

    python main_features.py --resume output/pretrain/checkpoint-399.pth --images DIR --output features.npz

DIR holds <class>/<images>, or images alone. features.npz holds `features` [N, D] (with --tokens all: [N, 1+L, D], class
token first), `files` [N], and, if there are class folders, `labels` [N] and `classes`. Then a k-NN accuracy is printed:
every image is classified by all the others, or with --neighbours DIR/train by the images of that folder.

With --pictures grid.png some of the images are drawn, too, a row each: the first three principal components of their
patch tokens as red, green and blue, what the class token attends to in the last block, and the nearest other images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import models_load
import models_vit
from util import errors, inference
from util.checkpoint.files import load_checkpoint
from util.command_line import Parser
from util.data import splits
from util.data.archives import ImagePath
from util.data.loaders import spread
from util.disk import output_path, write_whole
from util.errors import UserError
from util.report import feature_maps, knn, pictures
from util.words import count_nouns, join_names

NEAREST = 3  # neighbours that are drawn


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a checkpoint")
    images_help = "images to encode, in class folders or not"
    add("--images", "--data_path", dest="data_path", required=True, type=Path, metavar="DIR", help=images_help)
    add("--output", required=True, type=output_path, help="file to write, .npz")
    add(
        "--tokens",
        default="pooled",
        choices=("class", "pooled", "all"),
        help="the class token, the mean of the patch tokens (pooled), or all tokens",
    )
    add("--pictures", type=output_path, metavar="FILE", help="picture to draw features into, .png for example")
    add("--num", default=8, type=int, help="largest number of images in --pictures, evenly spread over the images")
    add("--heads", action="store_true", help="draw the attention of every head in --pictures, too")
    add("--neighbours", type=Path, metavar="DIR", help="<class>/<images> that classify those of --images by k-NN")
    inference.add_flags(parser)
    args = parser.parse_args(argv)
    if args.num < 1:
        parser.error("--num must be at least 1")
    if args.heads and not args.pictures:
        parser.error("--heads is drawn into --pictures, which is missing")
    if args.neighbours and args.tokens == "all":
        parser.error("--neighbours needs one feature per image: pass --tokens class or pooled")
    return args


class Encoded(NamedTuple):
    """Encoded images.

    Attributes:
        features: A feature per image [M, D], or all its tokens [M, 1+L, D], as float32 on the CPU.
        files: The M images.
    """

    features: Tensor
    files: list[ImagePath]

    def pooled(self) -> Tensor:
        """Return a feature per image [M, D]: of all tokens the mean of the patches'."""
        return self.features if self.features.ndim == 2 else self.features[:, 1:].mean(dim=1)


def encode(model: models_vit.VisionTransformer, batches: inference.Batches, kind: str) -> Encoded:
    """Encode the images that are readable.

    Args:
        model: The encoder.
        batches: The images.
        kind: "class": the class token; "pooled": the mean of the patch tokens; "all": all tokens.

    Raises:
        UserError: No image can be read.
    """
    features, readable = torch.empty(0), []
    for files, imgs in batches:
        tokens = model.forward_features(imgs)  # [N, 1+L, D]
        part = {"class": tokens[:, 0], "pooled": tokens[:, 1:].mean(dim=1), "all": tokens}[kind].float().cpu()
        batches.report_not_finite(part, files)
        if not readable:  # room for all images, of which a second copy might not fit into the memory
            features = part.new_empty(len(batches.files), *part.shape[1:])
        features[len(readable) : len(readable) + len(files)] = part
        readable += files
    return Encoded(features[: len(readable)], readable)


def draw(
    model: models_vit.VisionTransformer,
    preprocessing: inference.Preprocessing,
    encoded: Encoded,
    others: Encoded | None,
    args: argparse.Namespace,
) -> None:
    """Write --pictures: a row per image with its features and its nearest neighbours.

    Args:
        model: The encoder.
        preprocessing: How its images are loaded.
        encoded: The images, of which some are drawn.
        others: Images whose nearest are drawn as neighbours; None: those of `encoded` themselves.
        args: The script's flags.
    """
    # Choose the images, and find their neighbours.
    chosen = torch.tensor(spread(len(encoded.files), args.num))
    pool = others or encoded
    features, candidates = (F.normalize(x, dim=1) for x in (encoded.pooled()[chosen], pool.pooled()))
    _, neighbours = knn.nearest(candidates, features, NEAREST, None if others else chosen)

    def load(source: Encoded, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images [N, C, H, W], normalised, and as they are shown, from 0 to 1, on the CPU."""
        files = [source.files[number] for number in numbers.flatten().tolist()]
        batches = inference.Batches(files, model.patch_embed.img_size, preprocessing)
        for _, imgs in batches:
            yield imgs, pictures.to_shown(imgs, batches.normalise.mean, batches.normalise.std).cpu()

    # Encode the chosen images once more, for their tokens and attention, and draw them.
    parts = []
    for imgs, shown in load(encoded, chosen):
        tokens, attention = feature_maps.encode_with_attention(model, imgs)
        parts.append((tokens[:, 1:].cpu(), attention.cpu(), shown))
    tokens, attention, originals = (torch.cat(part) for part in zip(*parts, strict=True))
    titles, rows = feature_maps.panels(tokens, attention, originals, model.patch_embed.grid_size, args.heads)

    # Beside them, their neighbours.
    if neighbours.numel():
        shown = torch.cat([shown for _, shown in load(pool, neighbours)])
        rows = torch.cat([rows, pictures.to_rgb(shown).unflatten(0, neighbours.shape)], dim=1)
        titles += [f"nearest {place}" for place in range(1, neighbours.shape[1] + 1)]

    caption = [
        f"{Path(args.resume).name}: first three principal components of the patch tokens,",
        "attention of the class token in the last block, nearest images by features",
    ]
    pictures.save(pictures.grid(rows, titles, caption), args.pictures)
    print(f"features of {count_nouns(len(rows), 'image')} drawn in {args.pictures}")


def labels_of(files: list[ImagePath], root: Path, classes: list[str] | None = None) -> tuple[Tensor | None, list[str]]:
    """Derive class numbers from the class folders that the files lie in.

    Args:
        files: Image files below root.
        root: Folder of the class folders.
        classes: Names of the classes, in the order of their numbers; None: the class folders, sorted.

    Returns:
        Class numbers [M], and the names of the classes; (None, []) if a file lies in root itself.

    Raises:
        UserError: There is a class folder that is not among the given classes, or the folders are those of splits.
    """
    relative = [path.relative_to(root) for path in files]
    beside = [str(path) for path in relative if len(path.parts) < 2]
    if beside:
        if len(beside) < len(relative):
            print(f"notice: no labels, since there are images beside the class folders: {join_names(beside, 3)}")
        return None, []
    names = [path.parts[0] for path in relative]
    if set(names) <= set().union(*splits.NAMES.values()) and "train" in names:
        raise UserError(f"{root} holds splits ({join_names(sorted(set(names)))}): name one of them, {root / 'train'}")
    classes = classes or sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{root} has classes that --neighbours lacks: {join_names(unknown, 5)}; remove them, or give others"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in names]), classes


def print_knn(
    encoded: Encoded, labels: Tensor, others: Encoded | None, args: argparse.Namespace, classes: list[str]
) -> None:
    """Print how well nearest neighbours tell the classes apart; nothing for all tokens, one image or one class.

    Args:
        encoded: The images to classify.
        labels: Their true classes [M].
        others: The images that classify them; None: every image is classified by all the others.
        args: The script's flags.
        classes: Names of the classes, in the order of their numbers.
    """
    if encoded.features.ndim > 2 or len(classes) < 2 or (others is None and len(labels) < 2):
        return
    features, labels = encoded.features.to(args.device), labels.to(args.device)
    if others:
        other_labels, _ = labels_of(others.files, args.neighbours, classes)
        accuracy = knn.accuracy(others.features.to(args.device), other_labels.to(args.device), features, labels)
        print(f"k-NN among {count_nouns(len(others.files), 'image')} of {args.neighbours.name}: {accuracy:.2f} %")
    else:
        accuracy = knn.accuracy(features, labels, features, labels, same=True)
        print(f"k-NN accuracy, each image classified by all others: {accuracy:.2f} %")


def refuse_shared(files: list[ImagePath], neighbours: list[ImagePath], args: argparse.Namespace) -> None:
    """Raise a UserError if an image would be its own neighbour, and be classified by itself."""
    own = {Path(str(path)).resolve() for path in files}
    if shared := [path for path in neighbours if Path(str(path)).resolve() in own]:
        shared = join_names(map(str, shared), 3)
        raise UserError(
            f"--neighbours {args.neighbours} and --images {args.data_path} share images ({shared}), which would be "
            "their own neighbours: omit --neighbours, or name other images"
        )


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Write the features of a folder's images (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")
    if args.pictures:
        pictures.refuse_other_formats("--pictures", args.pictures)

    # Find the images and their classes; the numbers of the classes are those of the neighbours, where there are any.
    files, neighbours = inference.find_images([args.data_path]), []
    inference.refuse_replacing(filter(None, (args.output, args.pictures)), files)
    classes = inference.archived_classes(args.neighbours or args.data_path)
    if args.neighbours:
        neighbours = inference.find_images([args.neighbours])
        refuse_shared(files, neighbours, args)
        neighbour_labels, classes = labels_of(neighbours, args.neighbours, classes)
        if neighbour_labels is None:
            raise UserError(f"--neighbours {args.neighbours} must hold <class>/<images>, and no images beside them")
    labels, classes = labels_of(files, args.data_path, classes)
    if args.neighbours and labels is None:
        raise UserError(f"--neighbours needs the classes of the images: {args.data_path} must hold <class>/<images>")

    # Encode the images; unreadable ones have no feature, and so no label.
    checkpoint = load_checkpoint(args.resume)
    model = models_load.encoder(checkpoint, args.resume).to(args.device).eval()
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.config["in_chans"], args)
    batches, others = (
        inference.Batches(paths, model.patch_embed.img_size, preprocessing) for paths in (files, neighbours)
    )
    encoded = encode(model, batches, args.tokens)
    files = encoded.files
    relative = [str(path.relative_to(args.data_path)) if path != args.data_path else path.name for path in files]
    arrays = {"features": encoded.features.numpy(), "files": np.array(relative)}
    if labels is not None:
        labels, _ = labels_of(files, args.data_path, classes)
        arrays |= {"labels": labels.numpy(), "classes": np.array(classes)}
    with write_whole(args.output) as unfinished:
        np.savez(unfinished, **arrays)
    print(f"{tuple(encoded.features.shape)} features of {count_nouns(len(files), 'image')} in {args.output}")

    # With classes, tell how well nearest neighbours separate them.
    encoded_others = encode(model, others, args.tokens) if neighbours else None
    if labels is not None:
        print_knn(encoded, labels, encoded_others, args, classes)
    if args.pictures:
        draw(model, preprocessing, encoded, encoded_others, args)
    inference.raise_if_incomplete([batches, others], args.output)


if __name__ == "__main__":
    errors.run(main)

"""Extract features of images with the encoder of any checkpoint, without masking.

    python main_features.py --resume output/pretrain/checkpoint-399.pth --data_path DIR --output features.npz

DIR holds <class>/<images>, or images alone. features.npz holds `features` [N, D] (with --tokens all: [N, 1+L, D], class
token first), `files` [N], and, if there are class folders, `labels` [N] and `classes`. Then a k-NN accuracy is printed:
every image is classified by all the others, or with --neighbours DIR/train by the images of that folder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models_vit
from util import errors, inference
from util.checkpoint.files import load_checkpoint
from util.checkpoint.output_dir import write_whole
from util.data.archives import ImagePath
from util.errors import UserError
from util.report import knn


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a checkpoint")
    add("--data_path", required=True, type=Path, metavar="DIR", help="images to encode, in class folders or not")
    add("--output", required=True, type=Path, help="file to write, .npz")
    add(
        "--tokens",
        default="pooled",
        choices=("class", "pooled", "all"),
        help="the class token, the mean of the patch tokens (pooled), or all tokens",
    )
    add("--neighbours", type=Path, metavar="DIR", help="<class>/<images> that classify those of --data_path by k-NN")
    inference.add_flags(parser)
    return parser.parse_args(argv)


def encode(
    model: models_vit.VisionTransformer, batches: inference.Batches, kind: str
) -> tuple[Tensor, list[ImagePath]]:
    """Encode images and return one feature per readable image, or all its tokens, and the files of these images.

    Args:
        model: The encoder.
        batches: The images.
        kind: "class": the class token; "pooled": the mean of the patch tokens; "all": all tokens.

    Returns:
        Features [M, D], or with kind "all" tokens [M, 1+L, D], as float32 on the CPU; and M files.

    Raises:
        UserError: No image can be read.
    """
    parts, readable = [], []
    for files, imgs in batches:
        tokens = model.forward_features(imgs)  # [N, 1+L, D]
        part = {"class": tokens[:, 0], "pooled": tokens[:, 1:].mean(dim=1), "all": tokens}[kind]
        parts.append(part.float().cpu())
        readable += files
    return torch.cat(parts), readable


def labels_of(files: list[ImagePath], root: Path, classes: list[str] | None = None) -> tuple[Tensor | None, list[str]]:
    """Derive class numbers from the class folders that the files lie in.

    Args:
        files: Image files below root.
        root: Folder of the class folders.
        classes: Names of the classes, in the order of their numbers; None: the class folders, sorted.

    Returns:
        Class numbers [M], and the names of the classes; (None, []) if a file lies in root itself.

    Raises:
        UserError: There is a class folder that is not among the given classes.
    """
    relative = [path.relative_to(root) for path in files]
    beside = [str(path) for path in relative if len(path.parts) < 2]
    if beside:
        if len(beside) < len(relative):
            print(
                f"notice: no labels, since {len(beside)} images lie beside the class folders: {', '.join(beside[:3])}"
            )
        return None, []
    names = [path.parts[0] for path in relative]
    classes = classes or sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{root} has classes that --neighbours lacks: {', '.join(unknown[:5])}; remove them, or give others"
        )
    return torch.tensor([classes.index(name) for name in names]), classes


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Write the features of a folder's images (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")

    # Find the images and their classes; the numbers of the classes are those of the neighbours, where there are any.
    files, neighbours, classes = inference.find([args.data_path]), [], None
    if args.neighbours:
        neighbours = inference.find([args.neighbours])
        neighbour_labels, classes = labels_of(neighbours, args.neighbours)
        if neighbour_labels is None:
            raise UserError(f"--neighbours {args.neighbours} must hold <class>/<images>, and no images beside them")
    labels, classes = labels_of(files, args.data_path, classes)
    if args.neighbours and (labels is None or args.tokens == "all"):
        raise UserError(
            "--neighbours needs class folders in --data_path, and one feature per image: --tokens class or pooled"
        )

    # Encode the images; unreadable ones have no feature, and so no label.
    checkpoint = load_checkpoint(args.resume)
    model = models_vit.from_checkpoint(checkpoint, args.resume, trunk_only=True).to(args.device).eval()
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.config["in_chans"], args)
    batches, others = (
        inference.Batches(paths, model.patch_embed.img_size, preprocessing) for paths in (files, neighbours)
    )
    features, files = encode(model, batches, args.tokens)
    relative = [str(path.relative_to(args.data_path)) for path in files]
    arrays = {"features": features.numpy(), "files": np.array(relative)}

    # With classes, tell how well nearest neighbours separate them.
    if labels is not None:
        labels, _ = labels_of(files, args.data_path, classes)
        arrays |= {"labels": labels.numpy(), "classes": np.array(classes)}
        if neighbours:
            neighbour_features, neighbours = encode(model, others, args.tokens)
            neighbour_labels, _ = labels_of(neighbours, args.neighbours, classes)
            accuracy = knn.accuracy(neighbour_features, neighbour_labels, features, labels)
            print(f"k-NN among {len(neighbours)} images of {args.neighbours.name}: {accuracy:.2f} %")
        elif features.ndim == 2 and len(files) > 1:
            accuracy = knn.accuracy(features, labels, features, labels, same=True)
            print(f"k-NN, each image named after the others: {accuracy:.2f} %")

    with write_whole(args.output) as unfinished:
        np.savez(unfinished, **arrays)
    print(f"{tuple(features.shape)} features of {len(files)} images in {args.output}")
    batches.check_complete(args.output)
    others.check_complete(args.output)


if __name__ == "__main__":
    errors.run(main)

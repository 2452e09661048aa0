"""Features of images from any checkpoint's encoder, without masking.

    python main_features.py --resume output/pretrain/checkpoint-399.pth --data_path DIR --output features.npz

DIR holds <class>/<images>, or images alone. features.npz: `features` [N, D] (--tokens all: [N, 1+L, D], the class token
first), `files` [N], and with class folders `labels` [N] and `classes`; then a k-NN accuracy is printed, each image
named after the others, or with --neighbours DIR/train after those.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models_vit
from util import errors, inference
from util.checkpoint.files import load_checkpoint
from util.errors import UserError
from util.report import knn


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from argv or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT")
    parser.add_argument("--data_path", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .npz")
    parser.add_argument("--tokens", default="pooled", choices=("class", "pooled", "all"), help="pooled: patches' mean")
    parser.add_argument("--neighbours", type=Path, metavar="DIR", help="<class>/<images> that name the others")
    inference.add_flags(parser)
    return parser.parse_args(argv)


def encode(
    model: models_vit.VisionTransformer, files: list[Path], preprocessing: inference.Preprocessing, kind: str
) -> Tensor:
    """Return the files' features [M, D], or with kind "all" tokens [M, 1+L, D], on the CPU."""
    parts = []
    for _, imgs in inference.batches(files, model.patch_embed.img_size, preprocessing):
        tokens = model.forward_features(imgs)  # [N, 1+L, D]
        part = {"class": tokens[:, 0], "pooled": tokens[:, 1:].mean(dim=1), "all": tokens}[kind]
        parts.append(part.float().cpu())
    return torch.cat(parts)


def labels_of(files: list[Path], root: Path, classes: list[str] | None = None) -> tuple[Tensor | None, list[str]]:
    """Class numbers by the folders within root, None where files lie in root itself; and the classes."""
    inside = [path.relative_to(root) for path in files]
    if any(len(path.parts) < 2 for path in inside):
        return None, []
    classes = classes or sorted({path.parts[0] for path in inside})
    strange = sorted({path.parts[0] for path in inside} - set(classes))
    if strange:
        raise UserError(f"{root} has classes that the other folder lacks: {', '.join(strange[:5])}")
    return torch.tensor([classes.index(path.parts[0]) for path in inside]), classes


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Write the features (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")
    files, others, classes = inference.find([args.data_path]), [], None
    if args.neighbours:
        others = inference.find([args.neighbours])
        named, classes = labels_of(others, args.neighbours)
        if named is None:
            raise UserError(f"--neighbours {args.neighbours} must hold <class>/<images>")
    labels, classes = labels_of(files, args.data_path, classes)
    if args.neighbours and (labels is None or args.tokens == "all"):
        raise UserError("--neighbours needs class folders in --data_path, and one feature per image (--tokens)")
    checkpoint = load_checkpoint(args.resume)
    model = models_vit.from_checkpoint(checkpoint, args.resume, trunk_only=True).to(args.device).eval()
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.config["in_chans"], args)
    features = encode(model, files, preprocessing, args.tokens)
    inside = [path.relative_to(args.data_path) for path in files]
    found = {"features": features.numpy(), "files": np.array([str(path) for path in inside])}
    if labels is not None:
        found |= {"labels": labels.numpy(), "classes": np.array(classes)}
        if others:
            accuracy = knn.accuracy(encode(model, others, preprocessing, args.tokens), named, features, labels)
            print(f"k-NN among {len(others)} images of {args.neighbours.name}: {accuracy:.2f} %")
        elif features.ndim == 2 and len(files) > 1:
            accuracy = knn.accuracy(features, labels, features, labels, same=True)
            print(f"k-NN, each image named after the others: {accuracy:.2f} %")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.output, **found)
    print(f"{tuple(features.shape)} features of {len(files)} images in {args.output}")


if __name__ == "__main__":
    errors.run(main)

"""Features of images from any checkpoint's encoder, without masking.

    python main_features.py --resume output/pretrain/checkpoint-399.pth --data_path DIR --output features.npz

DIR holds <class>/<images>, or images alone. features.npz: `features` [N, D] (--tokens all: [N, 1+L, D], the class token
first), `files` [N], and with class folders `labels` [N] and `classes`; then a k-NN accuracy is printed, each image
named after the others.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import models_vit
from util import errors, knn, views
from util.errors import UserError
from util.files import checkpoint_args, load_checkpoint
from util.images import Pixels


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from argv or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT")
    parser.add_argument("--data_path", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .npz")
    parser.add_argument("--tokens", default="pooled", choices=("class", "pooled", "all"), help="pooled: patches' mean")
    views.add_flags(parser)
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Write the features (argv defaults to the command line's)."""
    args = get_args(argv)
    views.check(args)
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")
    files = views.find([args.data_path])
    checkpoint = load_checkpoint(args.resume)
    model = models_vit.from_checkpoint(checkpoint, args.resume, trunk_only=True).to(args.device).eval()
    pixels = Pixels.of(checkpoint_args(checkpoint), model.config["in_chans"])
    parts = []
    for _, imgs in views.batches(files, model.patch_embed.img_size, pixels, args):
        tokens = model.forward_features(imgs)  # [N, 1+L, D]
        part = {"class": tokens[:, 0], "pooled": tokens[:, 1:].mean(dim=1), "all": tokens}[args.tokens]
        parts.append(part.float().cpu())
    features = torch.cat(parts)
    inside = [path.relative_to(args.data_path) for path in files]
    found = {"features": features.numpy(), "files": np.array([str(path) for path in inside])}
    if all(len(path.parts) > 1 for path in inside):
        classes = sorted({path.parts[0] for path in inside})
        labels = torch.tensor([classes.index(path.parts[0]) for path in inside])
        found |= {"labels": labels.numpy(), "classes": np.array(classes)}
        if features.ndim == 2 and len(files) > 1:
            accuracy = knn.accuracy(features, labels, features, labels, same=True)
            print(f"k-NN, each image named after the others: {accuracy:.2f} %")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.output, **found)
    print(f"{tuple(features.shape)} features of {len(files)} images in {args.output}")


if __name__ == "__main__":
    errors.run(main)

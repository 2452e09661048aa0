"""Name the classes of images with a fine-tuned or probed checkpoint.

    python main_predict.py --resume output/finetune/checkpoint-99.pth --images DIR --output predictions.csv

A line per image: file, class, probability, then the five most probable classes with their probabilities. The names are
those of the checkpoint's own class_to_idx. Of a sweep's heads the best one speaks.
"""

import argparse
import csv
from pathlib import Path

import torch

import models_vit
from util import errors, inference
from util.checkpoint.files import load_checkpoint
from util.errors import UserError


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from argv or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT")
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--output", required=True, type=Path, help="CSV to write")
    inference.add_flags(parser)
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Write the predictions (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    files = inference.find(args.images)
    checkpoint = load_checkpoint(args.resume)
    names = checkpoint.get("class_to_idx")
    if not names:
        raise UserError(f"{args.resume} holds no class names: take one of main_finetune.py or main_linprobe.py")
    model = models_vit.from_checkpoint(checkpoint, args.resume).to(args.device).eval()
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.config["in_chans"], args)
    names = sorted(names, key=names.get)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        k = min(5, len(names))
        ranks = [f"{word}{number}" for number in range(1, k + 1) for word in ("top", "p")]
        writer.writerow(["file", "class", "probability", *ranks])
        for paths, imgs in inference.batches(files, model.patch_embed.img_size, preprocessing):
            top = model(imgs).float().softmax(dim=1).topk(k)
            for path, shares, numbers in zip(paths, top.values.tolist(), top.indices.tolist(), strict=True):
                best = [word for share, n in zip(shares, numbers, strict=True) for word in (names[n], f"{share:.4f}")]
                writer.writerow([path, *best[:2], *best])
    print(f"{len(files)} images named in {args.output}")


if __name__ == "__main__":
    errors.run(main)

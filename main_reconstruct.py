"""What a pre-trained autoencoder makes of images: the paper's Figure 2 as a picture.

    python main_reconstruct.py --resume output/pretrain/checkpoint-399.pth --images DIR --output grid.png

A row per image: original, masked, reconstruction, reconstruction with the visible patches put back. The model is built
from the checkpoint's own description; --separate writes single pictures into a folder instead.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import models_mae
from util import errors, inference, masking
from util.checkpoint.files import load_checkpoint
from util.data import loaders
from util.errors import UserError
from util.report import pictures


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from argv or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a checkpoint with its decoder")
    add("--images", required=True, nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    add("--output", required=True, type=Path, help="picture to write; with --separate a folder")
    add("--separate", action="store_true", help="single pictures instead of one grid")
    add("--mask_ratio", default=0.75, type=float)
    add("--mask_sampling", default="random", choices=masking.KINDS)
    add("--seed", default=0, type=int, help="of the masks, together with each file's name")
    add("--num", default=8, type=int, help="at most so many images, evenly spread over those found")
    add("--norm_pix_loss", action="store_true", help="the targets were normalised; for files that don't say")
    inference.add_flags(parser)
    args = parser.parse_args(argv)
    if not 0 < args.mask_ratio < 1 or args.num < 1:
        parser.error("--mask_ratio must lie between 0 and 1, --num must be at least 1")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Write the pictures (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    kind = Image.registered_extensions().get(args.output.suffix.lower())
    if not args.separate and kind not in Image.SAVE:
        raise UserError(f"--output {args.output}: a picture wanted, .png for example; or --separate and a folder")
    files = inference.find(args.images, args.num)
    checkpoint = load_checkpoint(args.resume)
    model = models_mae.from_checkpoint(checkpoint, args.resume, args.norm_pix_loss).to(args.device).eval()
    size, grid, patches = model.patch_embed.img_size, model.patch_embed.grid_size, model.patch_embed.num_patches
    if not 1 <= int(patches * (1 - args.mask_ratio)) < patches:
        raise UserError(f"--mask_ratio {args.mask_ratio} must keep and remove at least one of {patches} patches")
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.in_chans, args)
    imgs = torch.cat([imgs for _, imgs in inference.batches(files, size, preprocessing)])
    noise = masking.fixed_noise(args.mask_sampling, [path.name for path in files], args.seed, grid, imgs.device)
    normalise = loaders.Normalise(preprocessing.pixels, imgs.device)
    rows = pictures.reconstruct(model, imgs, args.mask_ratio, noise, normalise.mean, normalise.std)

    epoch = checkpoint.get("epoch")
    caption = [
        f"{Path(args.resume).name}"
        + (f", epoch {epoch}" if epoch is not None else "")
        + f", {args.mask_ratio:.0%} masked ({args.mask_sampling})"
    ] + [pictures.NORMALISED] * model.norm_pix_loss
    if args.separate:
        args.output.mkdir(parents=True, exist_ok=True)
        alike = len({path.stem for path in files}) < len(files)
        for number, (path, row) in enumerate(zip(files, rows, strict=True)):
            stem = f"{number:04d}-{path.stem}" if alike else path.stem
            for title, panel in zip(pictures.COLUMNS, row, strict=True):
                pictures.to_picture(panel).save(args.output / f"{stem}-{title.replace(' ', '_')}.png")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pictures.grid(rows, caption).save(args.output)
    print(f"{', '.join(caption)}: {len(files)} images in {args.output}")


if __name__ == "__main__":
    errors.run(main)

"""Draw how a pre-trained autoencoder reconstructs images, as in the paper's Figure 2.

    python main_reconstruct.py --resume output/pretrain/checkpoint-399.pth --images DIR --output grid.png

The grid has a row per image: original, masked, reconstruction, and reconstruction with the visible patches put back.
With --separate each panel becomes a file of its own in the folder --output. The model is built from the configuration
that the checkpoint stores.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import models_load
from util import errors, inference, masking
from util.checkpoint.files import load_checkpoint
from util.command_line import Parser
from util.data.archives import ImagePath
from util.disk import write_whole
from util.errors import UserError
from util.report import pictures


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a checkpoint with its decoder")
    add("--images", required=True, nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="images to reconstruct")
    add("--output", required=True, type=Path, help="file to write; with --separate a folder")
    add("--separate", action="store_true", help="write each panel to a file of its own instead of one grid")
    add("--mask_ratio", default=0.75, type=float, help="share of the patches that are removed")
    add("--mask_sampling", default="random", choices=masking.KINDS, help="which patches are removed")
    add("--seed", default=0, type=int, help="the mask of an image follows from the seed and the name of the file")
    add("--num", default=8, type=int, help="largest number of images, evenly spread over those of --images")
    inference.add_norm_pix_loss(parser)
    inference.add_flags(parser)
    args = parser.parse_args(argv)
    if args.num < 1:
        parser.error("--num must be at least 1")
    return args


def save_panels(folder: Path, files: list[ImagePath], rows: Tensor) -> None:
    """Write every panel to folder/<file name without extension>-<panel>.png.

    If any two files share that name, the names of all panels start with the image's number.

    Args:
        folder: Created if it does not exist.
        files: N image files.
        rows: Their panels, [N, 4, C, H, W].
    """
    # Images of several folders may share a name: a number keeps their files apart.
    has_duplicates = len({path.stem for path in files}) < len(files)
    for number, (path, row) in enumerate(zip(files, rows, strict=True)):
        stem = f"{number:04d}-{path.stem}" if has_duplicates else path.stem
        for title, panel in zip(pictures.COLUMNS, row, strict=True):
            with write_whole(folder / f"{stem}-{title.replace(' ', '_')}.png") as unfinished:
                pictures.to_picture(panel).save(unfinished)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Write the reconstructions (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    if not args.separate:
        pictures.refuse_other_formats("--output", args.output, ", or pass --separate and a folder")
    files = inference.find(args.images, args.num)

    # Load the autoencoder. How many patches there are, and so which mask ratios are possible, is known only now.
    checkpoint = load_checkpoint(args.resume)
    model = models_load.autoencoder(checkpoint, args.resume, args.norm_pix_loss).to(args.device).eval()
    size, grid, num_patches = model.patch_embed.img_size, model.patch_embed.grid_size, model.patch_embed.num_patches
    if problems := masking.ratio_problems(args.mask_ratio, num_patches):
        raise UserError(problems[0])

    # Load the images, remove patches, and reconstruct. The masks are the same in every call.
    batches = inference.Batches(files, size, inference.preprocessing_as_trained(checkpoint, model.in_chans, args))
    files, parts, normalise = [], [], batches.normalise
    for paths, imgs in batches:
        noise = masking.fixed_noise(args.mask_sampling, [path.name for path in paths], args.seed, grid, imgs.device)
        panels = pictures.reconstruct(model, imgs, args.mask_ratio, noise, normalise.mean, normalise.std)
        parts.append(panels.cpu())
        files += paths
    rows = torch.cat(parts)

    # Write the panels under a caption that tells where they come from.
    epoch = checkpoint.get("epoch")
    of_epoch = f", epoch {epoch}" if epoch is not None else ""
    caption = [f"{Path(args.resume).name}{of_epoch}, {args.mask_ratio:.0%} masked ({args.mask_sampling})"]
    if model.norm_pix_loss:
        caption.append(pictures.NORMALISED)
    if args.separate:
        save_panels(args.output, files, rows)
    else:
        pictures.save(pictures.grid(rows, pictures.COLUMNS, caption), args.output)
    print(f"{', '.join(caption)}: {len(files)} images in {args.output}")
    inference.check_complete([batches], args.output)


if __name__ == "__main__":
    errors.run(main)

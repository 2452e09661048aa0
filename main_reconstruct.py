"""Draw how a pre-trained autoencoder reconstructs images, as in the paper's Figure 2.

    python main_reconstruct.py --resume output/pretrain/checkpoint-399.pth --images DIR --output grid.png

The grid has a row per image: original, masked, reconstruction, and reconstruction with the visible patches put back.
With --separate each panel becomes a file of its own in the folder --output. The model is built from the configuration
that the checkpoint stores.
"""

import argparse
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import models_load
from util import errors, inference, masking
from util.checkpoint.files import load_checkpoint
from util.command_line import Parser
from util.data.archives import ImagePath
from util.disk import output_path, write_whole
from util.errors import UserError
from util.report import pictures
from util.words import count_nouns


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a checkpoint with its decoder")
    add("--images", required=True, nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="images to reconstruct")
    add("--output", required=True, type=output_path, help="file to write; with --separate a folder")
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


def panel_files(folder: Path, files: list[ImagePath]) -> dict[ImagePath, list[Path]]:
    """Return for each image the files of its panels: folder/<file name without extension>-<panel>.png.

    If any two images share that name, the names of all panels start with the image's number.
    """
    has_duplicates = len({path.stem for path in files}) < len(files)
    stems = [f"{number:04d}-{path.stem}" if has_duplicates else path.stem for number, path in enumerate(files)]
    endings = [f"-{title.replace(' ', '_')}.png" for title in pictures.COLUMNS]
    return {path: [folder / f"{stem}{ending}" for ending in endings] for path, stem in zip(files, stems, strict=True)}


def save_panels(targets: list[Path], panels: Tensor) -> None:
    """Write the panels of an image [4, C, H, W] to files, whose folder is made if needed."""
    for target, panel in zip(targets, panels, strict=True):
        with write_whole(target) as unfinished:
            pictures.to_picture(panel).save(unfinished)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Write the reconstructions (argv defaults to the command line's)."""
    args = get_args(argv)
    inference.check(args)
    if not args.separate:
        pictures.refuse_other_formats("--output", args.output, ", or pass --separate and a folder")
    files = list(dict.fromkeys(inference.find_images(args.images, args.num)))  # each once
    targets = panel_files(args.output, files) if args.separate else {}
    inference.refuse_replacing(chain.from_iterable(targets.values()) if args.separate else [args.output], files)

    # Load the autoencoder. How many patches there are, and so which mask ratios are possible, is known only now.
    checkpoint = load_checkpoint(args.resume)
    model = models_load.autoencoder(checkpoint, args.resume, args.norm_pix_loss).to(args.device).eval()
    size, grid, num_patches = model.patch_embed.img_size, model.patch_embed.grid_size, model.patch_embed.num_patches
    if problems := masking.ratio_problems(args.mask_ratio, num_patches):
        raise UserError(problems[0])

    # Load the images, remove patches, and reconstruct. The masks are the same in every call. Panels of a grid are kept.
    batches = inference.Batches(files, size, inference.preprocessing_as_trained(checkpoint, model.in_chans, args))
    count, parts, normalise = 0, [], batches.normalise
    for paths, imgs in batches:
        noise = masking.fixed_noise(args.mask_sampling, [path.name for path in paths], args.seed, grid, imgs.device)
        panels = pictures.reconstruct(model, imgs, args.mask_ratio, noise, normalise.mean, normalise.std)
        batches.report_not_finite(panels, paths)
        count += len(paths)
        if args.separate:
            for path, row in zip(paths, panels.cpu(), strict=True):
                save_panels(targets[path], row)
        else:
            parts.append(panels.cpu())

    # Write the grid under a caption that tells where they come from.
    epoch = checkpoint.get("epoch")
    of_epoch = f", epoch {epoch}" if epoch is not None else ""
    caption = [f"{Path(args.resume).name}{of_epoch}, {args.mask_ratio:.0%} masked ({args.mask_sampling})"]
    if model.norm_pix_loss:
        caption.append(pictures.NORMALISED)
    if not args.separate:
        pictures.save(pictures.grid(torch.cat(parts), pictures.COLUMNS, caption), args.output)
    print(f"{', '.join(caption)}: {count_nouns(count, 'image')} in {args.output}")
    inference.raise_if_incomplete([batches], args.output)


if __name__ == "__main__":
    errors.run(main)

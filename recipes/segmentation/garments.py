"""Write the samples of Fashion-MNIST with masks: 0 is the background, which is black, k the garments of class k - 1.

python recipes/segmentation/garments.py DIR [--images N]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from util import errors
from util.command_line import Parser
from util.errors import UserError

SAMPLES = Path(__file__).resolve().parent.parent.parent / "samples" / "fashion_mnist"


def refuse_leftovers(target: Path, wanted: set[Path]) -> None:
    """Check that the folder holds no other files than those to be written, which would be trained on, too.

    Args:
        target: Folder to write.
        wanted: Images and masks that will be written.

    Raises:
        UserError: It holds another file.
    """
    for path in sorted(target.glob("*/*/*/*")):
        if path not in wanted:
            raise UserError(f"{path} would not belong to the images: remove {target}, or choose another folder")


def main() -> None:
    """Write DIR/{train,val}/{images,masks}/<class>/<image>.png; the images are links."""
    parser = Parser(__doc__)
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--images", type=int, metavar="N", help="training images of each class; default: all 200")
    args = parser.parse_args()
    if args.images is not None and args.images < 1:
        raise UserError(f"--images {args.images} must be at least 1")

    # List the samples to use, with the number of their class, the image and the mask to write for each.
    jobs = []
    for split, count in (("train", args.images), ("val", None)):
        for number, folder in enumerate(sorted((SAMPLES / split).iterdir()), start=1):
            images, masks = (args.target / split / kind / folder.name for kind in ("images", "masks"))
            jobs += [(file, number, images / file.name, masks / file.name) for file in sorted(folder.iterdir())[:count]]
    refuse_leftovers(args.target, {path for _, _, *paths in jobs for path in paths})

    # The mask is made of the pixels that are not black; the image is a link to the sample.
    for sample, number, image_path, mask_path in jobs:
        for path in (image_path, mask_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(sample) as image:
            garment = np.array(image.convert("L")) > 0
        Image.fromarray(garment.astype(np.uint8) * number).save(mask_path)
        image_path.unlink(missing_ok=True)
        image_path.symlink_to(sample)


if __name__ == "__main__":
    errors.run(main)

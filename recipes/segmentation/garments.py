"""Write the samples of Fashion-MNIST with masks: 0 is the background, which is black, k the garments of class k - 1.

python recipes/segmentation/garments.py DIR [--images N]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES = Path(__file__).resolve().parent.parent.parent / "samples" / "fashion_mnist"


def main() -> None:
    """Write DIR/{train,val}/{images,masks}/<class>/<image>.png; the images are links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--images", type=int, metavar="N", help="training images of each class; default: all 200")
    args = parser.parse_args()
    for split, count in (("train", args.images), ("val", None)):
        for number, folder in enumerate(sorted((SAMPLES / split).iterdir()), start=1):
            images, masks = (args.target / split / kind / folder.name for kind in ("images", "masks"))
            for place in (images, masks):
                place.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir())[:count]:
                with Image.open(file) as image:
                    garment = np.array(image.convert("L")) > 0
                Image.fromarray(garment.astype(np.uint8) * number).save(masks / file.name)
                (images / file.name).unlink(missing_ok=True)
                (images / file.name).symlink_to(file)


if __name__ == "__main__":
    main()

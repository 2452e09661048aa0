"""Predict the classes of images with a fine-tuned or probed checkpoint.

    python main_predict.py --resume output/finetune/checkpoint-99.pth --images DIR --output predictions.csv

The CSV has a line per readable image: file, most probable class and its probability, then the five most probable
classes with their probabilities. The names of the classes are those that the checkpoint stores (class_to_idx), or
those of --class_names, which released files need. Of a learning-rate sweep the best head predicts.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch

import models_load
import models_vit
from util import errors, inference
from util.checkpoint.classes import resolve_class_names
from util.checkpoint.files import load_checkpoint
from util.command_line import Parser
from util.data.archives import ImagePath
from util.data.class_names import read_class_names
from util.disk import STANDARD_OUTPUT, output_path, write_csv
from util.errors import UserError
from util.words import count_nouns

TOP = 5  # classes per image, or all where there are fewer


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="file or address of a classifier's checkpoint")
    add("--images", required=True, nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="images to classify")
    add("--output", required=True, type=output_path, help="CSV file to write; -: standard output")
    inference.add_class_names(parser)
    inference.add_flags(parser)
    return parser.parse_args(argv)


def predict(
    model: models_vit.VisionTransformer, batches: inference.Batches, k: int
) -> Iterator[tuple[ImagePath, list[float], list[int]]]:
    """Yield for each readable image its file, and the probabilities and numbers of its k most probable classes.

    The best class comes first.

    Args:
        model: The classifier.
        batches: The images.
        k: Classes per image, at most the model's number of classes.

    Raises:
        UserError: No image can be read.
    """
    for paths, imgs in batches:
        probabilities = model(imgs).float().softmax(dim=1)
        batches.report_not_finite(probabilities, paths)
        top = probabilities.topk(k)
        yield from zip(paths, top.values.tolist(), top.indices.tolist(), strict=True)


def rows(model: models_vit.VisionTransformer, batches: inference.Batches, classes: list[str]) -> Iterator[list]:
    """Yield the table's head, and a row for each image as soon as it is classified.

    The best class stands twice: by itself, and as the first of the TOP best.
    """
    k = min(TOP, len(classes))
    ranks = [f"{column}{rank}" for rank in range(1, k + 1) for column in ("top", "p")]
    yield ["file", "class", "probability", *ranks]
    for path, probabilities, numbers in predict(model, batches, k):
        cells = []
        for number, probability in zip(numbers, probabilities, strict=True):
            cells += [classes[number], f"{probability:.4f}"]
        yield [path, *cells[:2], *cells]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Classify every image and write a CSV row for each (argv defaults to the command line's)."""
    args = get_args(argv)
    # Where the table goes to standard output or through a pipe, messages go to stderr.
    is_stream = args.output == STANDARD_OUTPUT or (args.output.exists() and not args.output.is_file())
    with redirect_stdout(sys.stderr if is_stream else sys.stdout):
        write_table(args)


def write_table(args: argparse.Namespace) -> None:
    """Write the table that the flags ask for.

    Raises:
        UserError: Flags, images or the checkpoint can't be used.
        Incomplete: Some images can't be read; the table has the others.
    """
    inference.check(args)
    files = inference.find_images(args.images)
    inference.refuse_replacing([args.output], files)

    # Load the classifier and the names of its classes.
    checkpoint = load_checkpoint(args.resume)
    model = models_load.classifier(checkpoint, args.resume).to(args.device).eval()
    given = read_class_names(args.class_names) if args.class_names else None
    classes = resolve_class_names(args.resume, checkpoint, model.config["num_classes"], given)
    if classes is None:
        raise UserError(f"{args.resume} holds no class names: pass --class_names FILE, with one name per line")
    preprocessing = inference.preprocessing_as_trained(checkpoint, model.config["in_chans"], args)

    batches = inference.Batches(files, model.patch_embed.img_size, preprocessing)
    write_csv(args.output, rows(model, batches, classes))
    print(f"classes of {count_nouns(len(files) - batches.bad, 'image')} written to {args.output}")
    inference.raise_if_incomplete([batches], args.output)


if __name__ == "__main__":
    errors.run(main)

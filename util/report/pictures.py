"""Reconstructions as pictures, as in the paper's Figure 2: original, masked, reconstruction, visible patches put back.

Shapes: N images, C channels, H x W pixels, L patches of p*p*C values; pixels from 0 to 1.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util.disk import write_whole
from util.errors import UserError

COLUMNS = ("original", "masked", "reconstruction", "with visible")
NORMALISED = "targets were normalised: each patch's mean and variance are the original's"


def panels(model: nn.Module, imgs: Tensor, pred: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn a model's predictions into the four panels of each image, in the order of COLUMNS.

    Args:
        model: The autoencoder: its patchify, to_patches and unpatchify are used.
        imgs: Images [N, C, H, W], normalised.
        pred: The model's predictions [N, L, p*p*C].
        mask: The masks [N, L], 1 = removed; removed patches are grey in the second panel.
        mean: Mean by which the images are normalised [C, 1, 1].
        std: Standard deviation by which they are normalised [C, 1, 1].

    Returns:
        The panels [N, 4, C, H, W], from 0 to 1. If an image's values lie outside of 0 to 1, its own range is mapped to
        0 to 1.
    """
    # Undo the normalisation of the images.
    patches, predicted = model.patchify(imgs), model.to_patches(pred, imgs)
    removed = mask[..., None].bool()
    pixels = [model.unpatchify(x) for x in (patches, predicted, torch.where(removed, predicted, patches))]
    pixels = [x * std + mean for x in pixels]

    low, width = shown_range(pixels[0])
    original, reconstruction, with_visible = (((x - low) / width).clamp(0, 1) for x in pixels)

    hidden = model.unpatchify(removed.to(imgs.dtype).expand_as(patches)).bool()
    return torch.stack([original, original.masked_fill(hidden, 0.5), reconstruction, with_visible], dim=1)


def shown_range(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of values that is shown as black to white, of each of the images [N, C, H, W].

    Returns:
        Its low end and its width, [N, 1, 1, 1] each: 0 and 1, or the image's own where that lies in other units.
    """
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    other_units = (low < -0.01) | (high > 1.01)
    return torch.where(other_units, low, 0.0), torch.where(other_units, high - low, 1.0)


def to_shown(imgs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn normalised images [N, C, H, W] into pixels from 0 to 1, as `shown_range` maps them.

    Args:
        imgs: Images [N, C, H, W], normalised.
        mean: Mean by which they are normalised [C, 1, 1].
        std: Standard deviation by which they are normalised [C, 1, 1].
    """
    pixels = imgs * std + mean
    low, width = shown_range(pixels)
    return ((pixels - low) / width).clamp(0, 1)


def to_rgb(pixels: Tensor) -> Tensor:
    """Turn images [N, C, H, W] into RGB [N, 3, H, W]: their first three channels, or of fewer the first in grey."""
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


@torch.no_grad()
def reconstruct(model: nn.Module, imgs: Tensor, mask_ratio: float, noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Reconstruct images in evaluation mode, and return their panels; the model's own mode is restored.

    Args:
        model: The autoencoder.
        imgs: Images [N, C, H, W], normalised.
        mask_ratio: Share of the patches that is removed.
        noise: Noise [N, L]; the patches with the smallest values stay.
        mean: Mean by which the images are normalised [C, 1, 1].
        std: Standard deviation by which they are normalised [C, 1, 1].

    Returns:
        The panels [N, 4, C, H, W], as `panels` makes them.
    """
    training = model.training
    model.eval()
    _, pred, mask = model(imgs, mask_ratio=mask_ratio, noise=noise)
    model.train(training)
    return panels(model, imgs, pred, mask, mean, std)


def to_picture(pixels: Tensor, side: int = 0) -> Image.Image:
    """Convert pixels to an RGB picture.

    Args:
        pixels: PixelSpec [C, H, W], from 0 to 1, of which the channels are shown that `to_rgb` takes.
        side: Least length of the picture's longer side in pixels, reached by whole-number magnification.
    """
    array = (to_rgb(pixels[None])[0].float().cpu() * 255).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
    picture = Image.fromarray(np.ascontiguousarray(array))
    times = -(-side // max(picture.size)) if side else 1  # rounded up
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def refuse_other_formats(flag: str, path: Path, remedy: str = "") -> None:
    """Raise UserError if a file that a flag names does not end in an image format that can be written."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"{flag} {path} does not end in an image format that can be written: end it in .png, for example{remedy}"
        )


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture to a file, in the format that the file's name ends in.

    Raises:
        UserError: The format has no pictures of this size, or the file can't be written.
    """
    encoded = io.BytesIO()
    try:
        encoded.name = path.name  # by which some coders choose among their forms
        picture.save(encoded)
    except (ValueError, OSError, OverflowError, RuntimeError, struct.error) as error:  # of the format's coder
        width, height = picture.size
        raise UserError(
            f"{path} can't hold {width} x {height} pixels ({error}): draw fewer images, or a .png"
        ) from error
    with write_whole(path) as unfinished:
        unfinished.write_bytes(encoded.getvalue())


def grid(rows: Tensor, titles: Sequence[str], caption: Sequence[str], side: int = 160) -> Image.Image:
    """Draw a row of panels per image, under the columns' titles and the lines of a caption.

    Args:
        rows: Panels [N, P, C, H, W].
        titles: Titles of the P columns.
        caption: Lines of text, at the top; at least one.
        side: Least length of a panel's longer side in pixels.
    """
    font, gap, line_height = ImageFont.load_default(14), 6, 20
    pictures = [[to_picture(panel, side) for panel in row] for row in rows]

    # The sheet is as wide as its panels or the longest line of the caption.
    width, height = pictures[0][0].size
    top = line_height * (len(caption) + 1) + gap
    total = max(len(titles) * (width + gap) + gap, *(round(font.getlength(text)) + 2 * gap for text in caption))
    sheet = Image.new("RGB", (total, top + len(rows) * (height + gap)), "white")

    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(caption):
        draw.text((gap, gap + number * line_height), text, "black", font)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left + width / 2, top - line_height / 2), title, "black", font, anchor="mm")
        for number, row in enumerate(pictures):
            sheet.paste(row[column], (left, top + number * (height + gap)))
    return sheet

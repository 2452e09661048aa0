"""The paper's Figure 2 as a picture: original, masked, reconstruction, reconstruction with the visible patches.

Shapes: N images, C channels, H x W pixels, L patches of p*p*C values; pixels from 0 to 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = ("original", "masked", "reconstruction", "with visible")
NORMALISED = "targets were normalised: each patch's mean and variance are the original's"


def panels(model, imgs: Tensor, pred: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The four pictures of each image, [N, 4, C, H, W].

    model: has patchify, unpatchify and norm_pix_loss; imgs [N, C, H, W] normalised by mean and std [C, 1, 1];
    pred [N, L, p*p*C] as the model predicts; mask [N, L], 1 = removed. The mask is laid over in grey.
    """
    patches, pred = model.patchify(imgs), pred.to(imgs.dtype)
    if model.norm_pix_loss:
        var, centre = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + centre
    removed = mask[..., None].bool()
    shown = [model.unpatchify(x) for x in (patches, pred, torch.where(removed, pred, patches))]
    shown = [x * std + mean for x in shown]
    # Values of other units than 0 to 1: the original's own range is shown.
    low, high = shown[0].amin((1, 2, 3), keepdim=True), shown[0].amax((1, 2, 3), keepdim=True)
    other = (low < -0.01) | (high > 1.01)
    low, width = torch.where(other, low, 0.0), torch.where(other, high - low, 1.0)
    original, reconstruction, mixed = (((x - low) / width).clamp(0, 1) for x in shown)
    hidden = model.unpatchify(removed.to(imgs.dtype).expand_as(patches)).bool()
    return torch.stack([original, original.masked_fill(hidden, 0.5), reconstruction, mixed], dim=1)


@torch.no_grad()
def reconstruct(model, imgs: Tensor, mask_ratio: float, noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """panels of what the model makes of imgs; in evaluation mode, the model's own mode is put back."""
    training = model.training
    model.eval()
    _, pred, mask = model(imgs, mask_ratio=mask_ratio, noise=noise)
    model.train(training)
    return panels(model, imgs, pred, mask, mean, std)


def to_picture(pixels: Tensor, side: int = 0) -> Image.Image:
    """[C, H, W] from 0 to 1 as a picture, its first 3 channels (grey where there are fewer); its longer side at least
    `side` pixels, by whole-number magnification."""
    array = (pixels[: 3 if len(pixels) >= 3 else 1].float().cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else np.ascontiguousarray(array[..., 0])).convert("RGB")
    times = -(-side // max(picture.size)) if side else 1
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def grid(rows: Tensor, caption: Sequence[str], side: int = 160) -> Image.Image:
    """A row per image under the columns' titles, with lines of text above. rows [N, 4, C, H, W]."""
    font, gap = ImageFont.load_default(14), 6
    pictures = [[to_picture(panel, side) for panel in row] for row in rows]
    width, height = pictures[0][0].size
    line = 20
    top = line * (len(caption) + 1) + gap
    total = max(4 * (width + gap) + gap, *(round(font.getlength(text)) + 2 * gap for text in caption))
    sheet = Image.new("RGB", (total, top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(caption):
        draw.text((gap, gap + number * line), text, "black", font)
    for column, title in enumerate(COLUMNS):
        left = gap + column * (width + gap)
        draw.text((left + width / 2, top - line / 2), title, "black", font, anchor="mm")
        for row, made in enumerate(pictures):
            sheet.paste(made[column], (left, top + row * (height + gap)))
    return sheet

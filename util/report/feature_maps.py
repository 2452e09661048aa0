"""Pictures of what an encoder makes of images: principal components of its patch tokens, the class token's attention.

Shapes: N images, C channels, H x W pixels, L patches, D encoder width; panels are RGB, from 0 to 1.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from util.report import pictures


def encode_with_attention(encoder: VisionTransformer, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images, and keep what the class token attends to in the last block.

    Args:
        encoder: The encoder.
        imgs: Images [N, C, H, W], normalised.

    Returns:
        All tokens [N, 1+L, D], and of each head the class token's attention to the patches [N, heads, L].
    """
    # Fused kernels keep no attention matrix: this block computes it, and its dropout layer passes it on.
    attention, kept = encoder.blocks[-1].attn, []
    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output[:, :, 0, 1:]))
    try:
        return encoder.forward_features(imgs), kept[0]
    finally:
        hook.remove()
        attention.fused_attn = fused


def principal_components(tokens: Tensor) -> Tensor:
    """Project patch tokens onto the first three principal components of all of them together.

    The sign of a component is such that its largest weight is positive, so that the same tokens always look the same.

    Args:
        tokens: Patch tokens [N, L, D] of all images.

    Returns:
        The components [N, L, 3], on the CPU; of each, the range from the 1st to the 99th percentile is stretched to 0
        to 1.
    """
    x = tokens.flatten(0, 1).cpu().double()  # not every device has double precision
    x = x - x.mean(dim=0)
    _, vectors = torch.linalg.eigh(x.T @ x)  # in the order of growing variance
    vectors = vectors[:, -3:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    projected = x @ (vectors * largest.sign())

    low, high = projected.quantile(torch.tensor([0.01, 0.99], dtype=x.dtype), dim=0)
    return ((projected - low) / (high - low)).nan_to_num().clamp(0, 1).float().view(*tokens.shape[:2], 3)


def heat(values: Tensor) -> Tensor:
    """Colour values [..., L], each row relative to its largest: black, red, yellow, white -> [..., L, 3]."""
    relative = (values / values.amax(dim=-1, keepdim=True)).nan_to_num()
    return torch.stack([3 * relative, 3 * relative - 1, 3 * relative - 2], dim=-1).clamp(0, 1)


def panels(
    tokens: Tensor, attention: Tensor, originals: Tensor, grid: tuple[int, int], per_head: bool
) -> tuple[list[str], Tensor]:
    """Draw the features of images.

    Args:
        tokens: Patch tokens [N, L, D].
        attention: The class token's attention to the patches, by head [N, heads, L].
        originals: The images as they are shown [N, C, H, W], from 0 to 1.
        grid: Patches of an image, down and across.
        per_head: Draw the attention of every head, beside their mean.

    Returns:
        The panels' titles, and the panels [N, P, 3, H, W], on the CPU: image, principal components, attention, each
        head's attention.
    """
    attention, originals = attention.float().cpu(), originals.cpu()
    titles = ["image", "components", "attention"]
    maps = [principal_components(tokens), heat(attention.mean(dim=1))]
    if per_head:
        titles += [f"head {number}" for number in range(1, attention.shape[1] + 1)]
        maps += heat(attention).unbind(dim=1)

    # A patch's colour fills its pixels.
    colours = torch.stack(maps, dim=1)  # [N, P, L, 3]
    planes = colours.unflatten(2, grid).permute(0, 1, 4, 2, 3).flatten(0, 1)
    drawn = F.interpolate(planes, originals.shape[2:]).unflatten(0, colours.shape[:2])
    return titles, torch.cat([pictures.to_rgb(originals)[:, None], drawn], dim=1)

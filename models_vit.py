"""Vision Transformers for fine-tuning and linear probing: timm's, under the names of the released MAE weights.

    model = models_vit.vit_base_patch16(num_classes=10, global_pool=True, drop_path_rate=0.1)
    logits = model(imgs)                                    # [N, C, H, W] -> [N, classes]
"""

import copy
from functools import partial

import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

# Width, depth and heads of the encoders; models_mae builds on the same.
SIZES = {
    "demo": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's ViT with MAE's head: LayerNorm eps 1e-6, and either of two poolings.

    global_pool=True averages the patch tokens (not the class token) and normalises by `fc_norm`, without a final
    `norm`; False takes the class token after `norm` (paper, appendix A.1 and A.2).
    `config` holds the arguments, so that a checkpoint can say how to build its model.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        global_pool: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        config = {
            "img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim,
            "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "num_classes": num_classes,
            "drop_path_rate": drop_path_rate,
        }  # fmt: skip
        super().__init__(
            **config,
            global_pool="avg" if global_pool else "token",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.config = {**config, "global_pool": global_pool}
        # Optimiser states are stored by parameter order, and the published order has the head before fc_norm.
        self.fc_norm = self._modules.pop("fc_norm")

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise decay: embeddings, each block, the rest (timm's puts `norm` with the last block)."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


class ProbeHeads(nn.Module):
    """Several linear heads on the same normalised features: [N, D] -> [N, heads, classes]."""

    def __init__(self, head: nn.Linear, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads], dim=1)


def make_linear_probe(model: VisionTransformer, heads: int = 1) -> VisionTransformer:
    """Freeze the trunk and put BatchNorm without affine before the linear head (paper, appendix A.1), in place.

    With several heads, which start alike, one pass over the trunk trains them all; logits are [N, heads, classes].
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    model.head.requires_grad_(True)
    head = model.head if heads == 1 else ProbeHeads(model.head, heads)
    model.head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), head)
    model.config |= {"probe": "linear", "probe_heads": heads}
    return model


def from_config(config: dict) -> VisionTransformer:
    """Build the classifier that a checkpoint's `model_config` describes (without its weights)."""
    arguments = {name: value for name, value in config.items() if name not in ("model", "probe", "probe_heads")}
    model = VisionTransformer(**arguments)
    return make_linear_probe(model, config.get("probe_heads", 1)) if config.get("probe") == "linear" else model


vit_demo_patch4 = partial(VisionTransformer, patch_size=4, **SIZES["demo"])
vit_tiny_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["tiny"])
vit_small_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["small"])
vit_base_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["base"])
vit_large_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["large"])
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, **SIZES["huge"])

MODELS = {name: factory for name, factory in globals().items() if name.startswith("vit_")}

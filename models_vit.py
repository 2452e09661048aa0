"""Vision Transformers for fine-tuning and linear probing: timm's, under the names of the released MAE weights.

model = models_vit.vit_base_patch16(num_classes=10, global_pool=True, drop_path_rate=0.1)
logits = model(imgs)                                    # [N, C, H, W] -> [N, classes]
"""

import copy
from functools import partial

import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from util.checkpoint.files import checkpoint_args
from util.checkpoint.formats import TRUNK
from util.distributed import dist
from util.errors import UserError

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
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "drop_path_rate": drop_path_rate,
        }
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


def train_last(model: VisionTransformer, blocks: float) -> VisionTransformer:
    """Partial fine-tuning (paper, Figure 9), in place: only the head, the last `blocks` blocks and the norm after them
    are trained; half a block is its MLP, with the norm before it. 0: the head alone, on probing's trunk."""
    model.requires_grad_(False)
    trained = [model.head, model.fc_norm]  # fc_norm is as new as the head, where there is one
    if blocks:
        whole = min(int(blocks), len(model.blocks))
        trained += [model.norm, *model.blocks[len(model.blocks) - whole :]]
        if blocks % 1 and whole < len(model.blocks):
            half = model.blocks[-whole - 1]
            trained += [half.norm2, half.mlp]
    for module in trained:
        module.requires_grad_(True)
    return model


def make_linear_probe(model: VisionTransformer, heads: int = 1, attentive: bool = False) -> VisionTransformer:
    """Freeze the trunk and put BatchNorm without affine before the linear head (paper, appendix A.1), in place.

    With several heads, which start alike, one pass over the trunk trains them all; logits are [N, heads, classes].
    attentive: what the head sees is pooled by one learned query that attends to the patch tokens, and trained with it.
    With global_pool, fc_norm's scale and bias, which no pre-trained file has, don't matter: BatchNorm undoes them.
    """
    model.requires_grad_(False)
    if attentive:
        model.attn_pool = AttentionPoolLatent(model.embed_dim, 0, num_heads=model.blocks[0].attn.num_heads)
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    model.head.requires_grad_(True)
    head = model.head if heads == 1 else ProbeHeads(model.head, heads)
    model.head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), head)
    model.config |= {"probe": "attentive" if attentive else "linear", "probe_heads": heads}
    return model


def keep_best_head(model: VisionTransformer, checkpoint: dict) -> VisionTransformer:
    """Of a sweep's heads only the one of best accuracy in the checkpoint's last evaluation, the first where there was
    none; in place."""
    if model.config.get("probe_heads", 1) > 1:
        stats = checkpoint.get("stats") or {}
        rates = checkpoint_args(checkpoint).get("blr") or [0.0]
        shares = [stats.get(f"test_acc1_blr{blr:g}", -1.0) for blr in rates]
        best = shares.index(max(shares))
        why = f"of best accuracy, {shares[best]:.2f} %" if shares[best] >= 0 else "the first: none was evaluated"
        dist.print_rank0(f"the head of --blr {rates[best]:g} is taken, {why}")
        model.head[1] = model.head[1].heads[best]
        model.config["probe_heads"] = 1
    return model


def from_config(config: dict) -> VisionTransformer:
    """Build the classifier that a checkpoint's `model_config` describes (without its weights)."""
    arguments = {name: value for name, value in config.items() if name not in ("model", "probe", "probe_heads")}
    model = VisionTransformer(**arguments)
    if "probe" not in config:
        return model
    return make_linear_probe(model, config.get("probe_heads", 1), config["probe"] == "attentive")


def from_checkpoint(checkpoint: dict, source: str, trunk_only: bool = False) -> VisionTransformer:
    """The classifier that a checkpoint of ours holds, weights included, of a sweep's heads the best one; with
    trunk_only the encoder of any of our jobs or of a released file, without head, whose class token passes through
    `norm` where the file has one.

    Raises UserError, naming the source, for a file that holds no such thing.
    """
    state, config = checkpoint["model"], dict(checkpoint.get("model_config") or {})
    if not trunk_only and not any(name.startswith("head.") for name in state):
        raise UserError(f"{source} has no head, so it names no classes: fine-tune or probe it first")
    if not config:
        config = config_of(state, source)
    if trunk_only:
        config = {name: config[name] for name in TRUNK} | {"num_classes": 0, "global_pool": "norm.weight" not in state}
        kept = from_config(config).state_dict()
        state = {name: value for name, value in state.items() if name in kept}
    model = from_config(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source} is no Vision Transformer of ours: {str(error).splitlines()[1].strip()}") from error
    return keep_best_head(model, checkpoint)


def config_of(state: dict[str, Tensor], source: str) -> dict:
    """The arguments of a classifier with weights of these shapes; heads, which leave no trace, as in SIZES."""
    try:
        dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} holds no Vision Transformer: it lacks {error}") from error
    for size in SIZES.values():
        if (size["embed_dim"], size["depth"]) == (dim, depth):
            return {
                **size,
                "img_size": side * patch_size,
                "patch_size": patch_size,
                "in_chans": channels,
                "mlp_ratio": 4.0,
                "num_classes": len(state.get("head.weight", ())),
                "global_pool": "fc_norm.weight" in state,
            }
    raise UserError(f"{source} doesn't say which model it holds, and none of ours is {dim} wide and {depth} deep")


vit_demo_patch4 = partial(VisionTransformer, patch_size=4, **SIZES["demo"])
vit_tiny_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["tiny"])
vit_small_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["small"])
vit_base_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["base"])
vit_large_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["large"])
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, **SIZES["huge"])

MODELS = {name: factory for name, factory in globals().items() if name.startswith("vit_")}

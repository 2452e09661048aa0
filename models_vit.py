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

from util.distributed import dist

# Width, depth and attention heads of the encoders; models_mae.py builds its autoencoders on the same ones.
SIZES = {
    "demo": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
PROBE_EPS = 1e-6  # of the BatchNorm before a probe's head


class VisionTransformer(timm_vit.VisionTransformer):
    """Classifier: timm's ViT with MAE's choice of two poolings, LayerNorm eps 1e-6, and a linear head.

    `config` holds the constructor's arguments, so that a checkpoint can tell how to build its model.
    """

    def __init__(  # noqa: PLR0913 (the model's published arguments)
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
        """Build the model with freshly initialised weights.

        Args:
            img_size: Height and width of the images in pixels, or one number for both.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the images.
            embed_dim: Width of the encoder.
            depth: Number of blocks.
            num_heads: Attention heads of a block.
            mlp_ratio: Width of a block's MLP as a multiple of the block's width.
            num_classes: Outputs of the head; 0: no head, the model returns the pooled features [N, D].
            global_pool: True averages the patch tokens, without the class token, and normalises the mean by `fc_norm`;
                there is no final `norm`. False takes the class token after `norm` (paper, appendix A.1 and A.2).
            drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        """
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
        """Return timm's description of the layers for layer-wise decay: the embeddings, each block, and the rest.

        Unlike timm's, it does not put the final `norm` with the last block.
        """
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


def head_name(blr: float) -> str:
    """Return the suffix that names a sweep's head in the log: blr0.1, as in test_acc1_blr0.1, for --blr 0.1."""
    return f"blr{blr:g}"


class ProbeHeads(nn.Module):
    """Several linear heads on the same normalised features; the heads start as copies of one."""

    def __init__(self, head: nn.Linear, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        """Apply every head: features [N, D] -> logits [N, heads, classes]."""
        return torch.stack([head(features) for head in self.heads], dim=1)


def freeze_all_but_last(model: VisionTransformer, blocks: float) -> VisionTransformer:
    """Freeze the model, in place, except for its head and its last blocks (partial fine-tuning: paper, Figure 9).

    Args:
        model: The classifier.
        blocks: Number of blocks that are trained, with the final `norm`. Half a block is its MLP with the LayerNorm
            before it. 0 trains only the head and, with average pooling, `fc_norm`, which is always trained.

    Returns:
        The same model.
    """
    model.requires_grad_(False)

    # fc_norm, which exists only with average pooling, is in no pre-trained file: it is as new as the head.
    trained = [model.head, model.fc_norm]
    if blocks:
        whole = min(int(blocks), len(model.blocks))
        trained += [model.norm, *model.blocks[len(model.blocks) - whole :]]
        if blocks % 1 and whole < len(model.blocks):
            half = model.blocks[-whole - 1]
            trained += [half.norm2, half.mlp]

    for module in trained:
        module.requires_grad_(True)
    return model


class BatchNormOverRanks(nn.BatchNorm1d):
    """BatchNorm of features that in training uses the statistics of all ranks' images together.

    So several ranks compute what one process would compute with all of their images. With a single process, and in
    evaluation, it is torch's BatchNorm1d. torch's SyncBatchNorm is not used because it refuses tensors on the CPU.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise the features [N, D] of this rank's images; in training, also update the running statistics."""
        # count_flops runs the model on "meta", where tensors hold no values to exchange.
        if not self.training or dist.world_size() == 1 or features.is_meta:
            return super().forward(features)

        # Mean and variance of all ranks' images. Every rank holds the same number: training has full batches only.
        N = len(features) * dist.world_size()
        x = features.float()  # as torch computes in mixed precision, too
        mean = dist.differentiable_sum(x.sum(dim=0)) / N
        variance = dist.differentiable_sum((x - mean).square().sum(dim=0)) / N

        # The running variance is the unbiased one, as torch's.
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * N / (N - 1), self.momentum)
            self.num_batches_tracked += 1
        return ((x - mean) * (variance + self.eps).rsqrt()).to(features.dtype)


def make_linear_probe(model: VisionTransformer, heads: int = 1, attentive: bool = False) -> VisionTransformer:
    """Freeze the encoder, in place, and put a BatchNorm without affine before the linear head (paper, appendix A.1).

    The head's weights are drawn anew: load trained ones afterwards.

    With average pooling the scale and bias of `fc_norm`, which no pre-trained file has, do not matter: BatchNorm undoes
    them.

    Args:
        model: The classifier.
        heads: Number of heads, one per learning rate of a sweep. They start alike, and one pass through the encoder
            trains them all; with several the logits are [N, heads, classes].
        attentive: Pool the patch tokens by attention with one learned query; the whole pooling layer is trained, too.

    Returns:
        The same model.
    """
    model.requires_grad_(False)
    if attentive:
        model.attn_pool = AttentionPoolLatent(model.embed_dim, 0, num_heads=model.blocks[0].attn.num_heads)
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    model.head.requires_grad_(True)
    head = model.head if heads == 1 else ProbeHeads(model.head, heads)
    model.head = nn.Sequential(BatchNormOverRanks(model.embed_dim, affine=False, eps=PROBE_EPS), head)
    model.config |= {"probe": "attentive" if attentive else "linear", "probe_heads": heads}
    return model


def select_classes(model: VisionTransformer, numbers: list[int]) -> None:
    """Keep only some classes' outputs of the head or heads, in place, in the order given.

    Args:
        model: The classifier.
        numbers: Numbers of the classes to keep; their places become the new numbers.
    """
    for head in model.head.modules():
        if isinstance(head, nn.Linear):
            head.weight, head.bias = nn.Parameter(head.weight[numbers]), nn.Parameter(head.bias[numbers])
            head.out_features = len(numbers)
    model.num_classes = model.config["num_classes"] = len(numbers)


vit_demo_patch4 = partial(VisionTransformer, patch_size=4, **SIZES["demo"])
vit_tiny_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["tiny"])
vit_small_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["small"])
vit_base_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["base"])
vit_large_patch16 = partial(VisionTransformer, patch_size=16, **SIZES["large"])
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, **SIZES["huge"])

MODELS = {name: factory for name, factory in globals().items() if name.startswith("vit_")}

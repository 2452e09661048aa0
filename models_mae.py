"""The masked autoencoder (He et al., arXiv 2111.06377).

    model = models_mae.mae_vit_base_patch16(norm_pix_loss=True)
    loss, pred, mask = model(imgs, mask_ratio=0.75)

Shapes: N images, C channels, H x W pixels, p patch size, L = (H/p)*(W/p) patches, K = int(L*(1-ratio)) of them
visible, D encoder width, E decoder width.
"""

from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from models_vit import SIZES
from util.masking import num_visible
from util.pos_embed import sincos_pos_embed


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens by index, per image: x [N, L, D], ids [N, M] -> [N, M, D]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder: a ViT encodes the visible patches, a small ViT predicts all; the loss is on the removed ones.

    Parameter names are those of the released weights. `config` holds the constructor's arguments, so that a checkpoint
    can tell how to build its model.
    """

    def __init__(  # noqa: PLR0913 (the model's published arguments)
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
    ) -> None:
        """Build the model with freshly initialised weights.

        Args:
            img_size: Height and width of the images in pixels, or one number for both.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the images.
            embed_dim: Width of the encoder.
            depth: Number of the encoder's blocks.
            num_heads: Attention heads of an encoder block.
            decoder_embed_dim: Width of the decoder.
            decoder_depth: Number of the decoder's blocks.
            decoder_num_heads: Attention heads of a decoder block.
            mlp_ratio: Width of a block's MLP as a multiple of the block's width.
            norm_pix_loss: Predict patches normalised by their own mean and variance (paper, section 3).
        """
        super().__init__()
        self.config = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "mlp_ratio": mlp_ratio,
            "norm_pix_loss": norm_pix_loss,
        }
        self.in_chans, self.norm_pix_loss = in_chans, norm_pix_loss
        self.grad_checkpointing = False
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)

        # Encoder. Positions are fixed, and stored since the released weights hold them.
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        # Decoder.
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_embed.proj.weight[0].numel())

        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as in appendix A.1: Xavier-uniform matrices, zero biases, sine-cosine positions.

        The class token and the mask token are normal with a standard deviation of 0.02. The patch projection is
        initialised as the linear layer that it stands for.
        """
        for table in (self.pos_embed, self.decoder_pos_embed):
            table.copy_(sincos_pos_embed(table.shape[-1], self.patch_embed.grid_size))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them (activation checkpointing)."""
        self.grad_checkpointing = enable

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images [N, C, H, W] into patches [N, L, p*p*C], row by row, channels last within a patch."""
        N, C, H, W = imgs.shape
        p, q = self.patch_embed.patch_size
        patches = imgs.reshape(N, C, H // p, p, W // q, q).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(N, (H // p) * (W // q), p * q * C)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Join patches [N, L, p*p*C] to images [N, C, H, W] of the model's size: the inverse of `patchify`."""
        p, q = self.patch_embed.patch_size
        h, w = self.patch_embed.grid_size
        imgs = patches.reshape(-1, h, w, p, q, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return imgs.reshape(-1, self.in_chans, h * p, w * q)

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random subset of each image's patches: shuffle, then cut (section 3, "Simple implementation").

        Args:
            x: Patches [N, L, anything].
            mask_ratio: Share of the patches that is removed.
            noise: Sort keys [N, L]; the patches with the K smallest stay. None: drawn uniformly.

        Returns:
            The visible patches [N, K, anything] in the order of their noise, the mask [N, L] (1 = removed), and
            ids_restore [N, L], each patch's rank by noise.
        """
        N, L, _ = x.shape
        K = num_visible(L, mask_ratio)
        if noise is None:
            noise = torch.rand(N, L, device=x.device)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        return gather_tokens(x, ids_shuffle[:, :K]), (ids_restore >= K).float(), ids_restore

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the visible patches.

        Args:
            imgs: Images [N, C, H, W].
            mask_ratio: Share of the patches that is removed.
            noise: As in `random_masking`.

        Returns:
            The latent tokens [N, 1+K, D], class token first, then the visible patches in the order of their noise, the
            mask [N, L] and ids_restore [N, L].

        Raises:
            ValueError: The images are not of the model's size.
        """
        if imgs.shape[2:] != self.patch_embed.img_size:
            raise ValueError(f"images are {tuple(imgs.shape[2:])}, the model is for {self.patch_embed.img_size}")

        # Mask first, so that pixels of removed patches are never embedded. The published interface of random_masking
        # does not return the indices of the visible patches: compute them from ids_restore.
        patches, mask, ids_restore = self.random_masking(self.patchify(imgs), mask_ratio, noise)  # [N, K, p*p*C]
        ids_keep = ids_restore.argsort(dim=1)[:, : patches.shape[1]]

        # Embed. A convolution whose stride is its kernel is a matrix product per patch.
        proj = self.patch_embed.proj
        x = F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)  # [N, K, D]
        x = x + gather_tokens(self.pos_embed[:, 1:].expand(len(x), -1, -1), ids_keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # [N, 1+K, D]

        return self.norm(self._run_blocks(self.blocks, x)), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch, visible ones included: latent [N, 1+K, D], ids_restore [N, L] -> pred [N, L, p*p*C]."""
        x = self.decoder_embed(latent)  # [N, 1+K, E]

        # Put a mask token in the place of each removed patch and undo the shuffling.
        N, L = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(N, 1 + L - x.shape[1], -1)
        patches = gather_tokens(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)  # [N, L, E]
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed

        x = self._run_blocks(self.decoder_blocks, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def target(self, imgs: Tensor) -> Tensor:
        """Return what the decoder should predict: patches [N, L, p*p*C], each normalised if norm_pix_loss is set."""
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def to_patches(self, pred: Tensor, imgs: Tensor) -> Tensor:
        """Return the patches [N, L, p*p*C] that predictions stand for: the inverse of `target`.

        Predictions of normalised patches get the mean and variance of the patches of imgs.
        """
        pred = pred.to(imgs.dtype)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(self.patchify(imgs), dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        return pred

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error per patch, averaged over the removed patches only (section 3), in fp32."""
        error = (pred.float() - self.target(imgs)).square().mean(dim=-1)  # [N, L]
        return (error * mask).sum() / mask.sum()

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode: imgs [N, C, H, W] -> loss (scalar), pred [N, L, p*p*C], mask [N, L] (1 = removed)."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


def _mae(size: str, patch_size: int, decoder: tuple[int, int, int]) -> partial:
    """Return the constructor of a model with an encoder of SIZES and a decoder given as (width, depth, heads)."""
    width, depth, heads = decoder
    return partial(
        MaskedAutoencoderViT,
        patch_size=patch_size,
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
        **SIZES[size],
    )


mae_vit_base_patch16_dec512d8b = _mae("base", 16, (512, 8, 16))
mae_vit_large_patch16_dec512d8b = _mae("large", 16, (512, 8, 16))
mae_vit_huge_patch14_dec512d8b = _mae("huge", 14, (512, 8, 16))

mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b
# Not in the paper: decoders in proportion to the smaller encoders.
mae_vit_small_patch16 = _mae("small", 16, (256, 8, 8))
mae_vit_tiny_patch16 = _mae("tiny", 16, (192, 4, 3))
mae_vit_demo_patch4 = _mae("demo", 4, (64, 2, 4))

MODELS = {name: factory for name, factory in globals().items() if name.startswith("mae_vit_")}

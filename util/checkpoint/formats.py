"""Other libraries' Vision Transformers: conversion of their names for weights.

Native names, which the reference's released files and timm have too:
    cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}, norm, fc_norm,
    head; an autoencoder also has mask_token and decoder_*
Names of Hugging Face's ViTMAE and ViT, in three generations:
    vit.encoder.layer.N.attention.attention.query    as released
    vit.layers.N.attention.q_proj                    in memory since transformers 5
    decoder.decoder_encoder.layer.N                  decoders as transformers 5 writes them
Names of mmpretrain's VisionTransformer: MMPRETRAIN below.
"""

import re
from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor

from util.checkpoint.configurations import known_config
from util.distributed import dist

# Hugging Face's older names as patterns, and the newer names that replace them, in this order.
GENERATIONS = (
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"attention\.attention\.(query|key|value)\.", lambda match: f"attention.{match[1][0]}_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
# Hugging Face's newer names and the native ones, outside the blocks.
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
# The same inside a block, without its prefix and number.
IN_BLOCKS = {
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Native names inside a block, and those of Hugging Face's released files.
RELEASED = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")
# Weights of Hugging Face's models that do not change what the encoder computes of a whole image: the pooler, the mask
# token and decoder of masked image modelling, heads.
HF_NO_ENCODER = re.compile(r"(vit\.)?(pooler\.|embeddings\.mask_token$|decoder\.0\.)|\w*classifier\.")
# mmpretrain's names as patterns, and the native names that replace them, in this order.
MMPRETRAIN = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
)


class Recognised(NamedTuple):
    """The result of recognising a state dict.

    Attributes:
        kind: The library and its model, for messages; "" where the names are native or unknown.
        state: The weights under the native names; as they were where `kind` is "". A weight of the encoder that has no
            native name keeps its own, so that whoever builds a model from them finds that it does not fit.
        left_out: Names of the weights that have no place in the models here, and do not belong to the encoder.
    """

    kind: str
    state: dict[str, Tensor]
    left_out: list[str]


def recognise(state: dict[str, Tensor]) -> Recognised:
    """Convert a state dict of Hugging Face's ViTMAE or ViT, or of mmpretrain, to the native names; others stay."""
    if "patch_embed.projection.weight" in state:
        return Recognised("mmpretrain's VisionTransformer", _from_mmpretrain(state), [])
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        native, left_out = _from_hugging_face(state)
        return Recognised(f"Hugging Face's {'ViTMAE' if 'mask_token' in native else 'ViT'}", native, left_out)
    return Recognised("", state, [])


def _from_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    native = {}
    for name, value in state.items():
        for pattern, replacement in MMPRETRAIN:
            name = re.sub(pattern, replacement, name)
        native[name] = value
    return native


def _from_hugging_face(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under their native names, and the names of those that are left out."""
    native, left_out, projections = {}, [], {}
    for name, value in state.items():
        if HF_NO_ENCODER.match(name) and not name.startswith("classifier."):
            left_out.append(name)
            continue

        # Bring every generation of names to the newest one.
        newest = name
        for pattern, replacement in GENERATIONS:
            newest = re.sub(pattern, replacement, newest)

        # Then look it up. Queries, keys and values, three matrices there and one here, are gathered first.
        block = re.fullmatch(r"(decoder\.decoder_)?layers\.(\d+)\.(.+)\.(weight|bias)", newest)
        inside = block[3] if block else ""
        prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}." if block else ""
        stem, _, kind = newest.rpartition(".")
        if inside in IN_BLOCKS:
            native[f"{prefix}{IN_BLOCKS[inside]}.{block[4]}"] = value
        elif re.fullmatch(r"attention\.[qkv]_proj", inside):
            projections.setdefault(f"{prefix}attn.qkv.{block[4]}", {})[inside.removeprefix("attention.")[0]] = value
        elif newest in NAMES:
            native[NAMES[newest]] = value
        elif stem in NAMES:
            native[f"{NAMES[stem]}.{kind}"] = value
        else:
            native[name] = value  # unknown, and perhaps a part of the encoder

    for name, matrices in projections.items():
        if len(matrices) == 3:
            native[name] = torch.cat([matrices[letter] for letter in "qkv"])
    return native, left_out


def file_grid(checkpoint: dict) -> tuple[int, int] | None:
    """Return the rows and columns of patches that a checkpoint's configuration tells of; None if it does not."""
    config = known_config(checkpoint)
    if "img_size" not in config:
        return None
    height, width = to_2tuple(config["img_size"])
    patch_size = config.get("patch_size") or checkpoint["model"]["patch_embed.proj.weight"].shape[-1]
    return height // patch_size, width // patch_size


def has_decoder(state: dict[str, Tensor]) -> bool:
    """Return whether the weights include a masked autoencoder's decoder."""
    return "decoder_pred.weight" in state


def count_blocks(state: dict[str, Tensor], prefix: str = "blocks.") -> int:
    """Return the number of Transformer blocks whose weights' names begin so."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def is_square(patches: int) -> bool:
    """Return whether so many patches can make up a square grid."""
    return patches > 0 and round(patches**0.5) ** 2 == patches


def add_class_position(checkpoint: dict, source: str, patches: int = 0) -> dict[str, Tensor]:
    """Return a checkpoint's weights, with positions that have a row for the class token.

    Where they have none, as with timm's no_embed_class, the class token gets no position: a row of zeros.

    Args:
        checkpoint: A loaded checkpoint. Weights without a class token, or with another form of positions, are returned
            as they are.
        source: Name of its file, for a notice.
        patches: Patches of the model that the weights are for; 0: unknown.
    """
    state, grid = checkpoint["model"], file_grid(checkpoint)
    positions, decoder = state.get("pos_embed"), state.get("decoder_pos_embed")
    if "cls_token" not in state or positions is None or positions.ndim != 3:
        return state

    # The file's own grid decides. Where it is unknown, it is inferred from the new model's patches, from the decoder's
    # rows, or from a square number of rows.
    rows = positions.shape[1]
    if grid:
        with_class, without_class = rows == 1 + grid[0] * grid[1], rows == grid[0] * grid[1]
    else:
        with_class = rows == 1 + patches or (decoder is not None and decoder.shape[1:2] == positions.shape[1:2])
        without_class = not is_square(rows - 1) and (rows == patches or (rows > 1 and is_square(rows)))
    if with_class or not without_class:
        return state
    dist.print_rank0(f"notice: the class token of {source} has no position of its own, and gets one of zeros")
    return state | {"pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def describe(checkpoint: dict) -> str:
    """Return a phrase for messages: the origin of a checkpoint, and the parts of a model that it holds."""
    state = checkpoint["model"]
    presence = {
        "encoder": "cls_token" in state,
        "decoder": has_decoder(state),
        "head": any(name.startswith("head.") for name in state),
    }
    parts = [name for name, present in presence.items() if present]
    origin = "in the names of timm and facebookresearch/mae"
    if "job" in checkpoint:
        origin = f"of main_{checkpoint['job']}.py"
    origin = checkpoint.get("format") or origin
    return f"{origin}, {' and '.join(parts) or 'no known part of a model'}"


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert native weights to those of Hugging Face's released files, with each qkv split into three.

    Raises:
        KeyError: A weight has no counterpart there, such as fc_norm's.
    """
    released_names = {native: name for name, native in NAMES.items()}
    converted = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not block:
            new = released_names[name] if name in released_names else f"{released_names[stem]}.{kind}"
            converted[new if new.startswith(("decoder.", "classifier.")) else f"vit.{new}"] = value
            continue
        prefix = f"decoder.decoder_layers.{block[2]}." if block[1] else f"vit.encoder.layer.{block[2]}."
        if block[3] != "attn.qkv":
            converted[f"{prefix}{RELEASED[block[3]]}.{block[4]}"] = value
            continue
        # Copies, since safetensors writes no tensors that share memory.
        for projection, part in zip(QKV, value.chunk(3), strict=True):
            converted[f"{prefix}attention.attention.{projection}.{block[4]}"] = part.clone()
    return converted

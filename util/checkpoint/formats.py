"""Other libraries' Vision Transformers: conversion of their names for weights and of their configurations.

Native names, which the reference's released files and timm have too:
    cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}, norm, fc_norm,
    head; an autoencoder also has mask_token and decoder_*
Names of Hugging Face's ViTMAE and ViT, in three generations:
    vit.encoder.layer.N.attention.attention.query    as released
    vit.layers.N.attention.q_proj                    in memory since transformers 5
    decoder.decoder_encoder.layer.N                  decoders as transformers 5 writes them
Names of mmpretrain's VisionTransformer: MMPRETRAIN below.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor

from util.data.images import Pixels
from util.data.transforms import default_crop_pct
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
# The arguments that define an encoder.
TRUNK = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
# What else the `model_config` of a checkpoint of this project may hold.
MORE_CONFIG = {
    *("model", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss"),
    *("num_classes", "global_pool", "drop_path_rate", "probe", "probe_heads"),
}
# Names of the file of weights in a folder of Hugging Face's, timm's or main_export.py's.
WEIGHT_FILES = ("model.safetensors", "encoder.safetensors", "pytorch_model.bin")


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
    """Convert a state dict of Hugging Face's ViTMAE or ViT, or of mmpretrain, to the native names; return others."""
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


def known_config(checkpoint: dict) -> dict:
    """Return those arguments of its model that a checkpoint tells: all, some of them (timm's folders), or none ({})."""
    return checkpoint.get("model_config") or checkpoint.get("described") or {}


def file_grid(checkpoint: dict) -> tuple[int, int] | None:
    """Return the rows and columns of patches that a checkpoint's configuration tells of; None if it does not."""
    config = known_config(checkpoint)
    if "img_size" not in config:
        return None
    height, width = to_2tuple(config["img_size"])
    patch_size = config.get("patch_size") or checkpoint["model"]["patch_embed.proj.weight"].shape[-1]
    return height // patch_size, width // patch_size


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

    # The file's own grid decides. Where it is unknown, the new model's, the decoder, or a square number of rows tells.
    rows = positions.shape[1]
    if grid:
        with_class, without_class = rows == 1 + grid[0] * grid[1], rows == grid[0] * grid[1]
    else:
        with_class = rows == 1 + patches or (decoder is not None and decoder.shape[1:2] == positions.shape[1:2])
        is_square = rows > 1 and round((rows - 1) ** 0.5) ** 2 == rows - 1
        without_class = not is_square and (rows == patches or (rows > 1 and round(rows**0.5) ** 2 == rows))
    if with_class or not without_class:
        return state
    dist.print_rank0(f"notice: the class token of {source} has no position of its own, and gets one of zeros")
    return state | {"pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def describe(checkpoint: dict) -> str:
    """Return a phrase for messages: the origin of a checkpoint, and the parts of a model that it holds."""
    state = checkpoint["model"]
    presence = {
        "encoder": "cls_token" in state,
        "decoder": "decoder_pred.weight" in state,
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


def hugging_face_class(config: dict, classes: list[str] | None) -> str:
    """Return the name of the class of transformers that runs a model.

    Args:
        config: The model's `config`, its constructor's arguments.
        classes: Names of a classifier's classes; None: it is an autoencoder or an encoder.
    """
    if classes is not None:
        return "ViTForImageClassification"
    return "ViTMAEForPreTraining" if "decoder_embed_dim" in config else "ViTModel"


def hugging_face_config(config: dict, classes: list[str] | None, mask_ratio: float) -> dict:
    """Return the content of Hugging Face's config.json for a model.

    Args:
        config: The model's `config`, its constructor's arguments.
        classes: Names of a classifier's classes, in the order of its outputs; None: it is an autoencoder or an encoder.
        mask_ratio: Share of the patches that is removed, for an autoencoder.
    """
    kind = hugging_face_class(config, classes)
    encoder = {
        "architectures": [kind],
        "model_type": "vit_mae" if kind == "ViTMAEForPreTraining" else "vit",
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": int(config["embed_dim"] * config["mlp_ratio"]),
        "image_size": config["img_size"],
        "patch_size": config["patch_size"],
        "num_channels": config["in_chans"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if kind == "ViTModel":
        return encoder
    if kind == "ViTForImageClassification":
        return {
            **encoder,
            "id2label": {str(number): name for number, name in enumerate(classes)},
            "label2id": {name: number for number, name in enumerate(classes)},
        }
    return {
        **encoder,
        "decoder_hidden_size": config["decoder_embed_dim"],
        "decoder_num_hidden_layers": config["decoder_depth"],
        "decoder_num_attention_heads": config["decoder_num_heads"],
        "decoder_intermediate_size": int(config["decoder_embed_dim"] * config["mlp_ratio"]),
        "mask_ratio": mask_ratio,
        "norm_pix_loss": config["norm_pix_loss"],
    }


def from_hugging_face_config(config: dict) -> dict:
    """Return the checkpoint entries that follow from Hugging Face's config.json.

    Returns:
        "model_config", and "class_to_idx" for a classifier whose classes have names.
    """
    # Keys that are missing stand for transformers' defaults.
    arguments = {
        "img_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
    }
    if isinstance(arguments["patch_size"], list):
        arguments["patch_size"] = arguments["patch_size"][0]  # of other than square patches the weights do not fit
    arguments["mlp_ratio"] = config.get("intermediate_size", 3072) / arguments["embed_dim"]

    # An autoencoder, or an encoder without a head.
    if "decoder_hidden_size" in config:
        arguments |= {
            "decoder_embed_dim": config["decoder_hidden_size"],
            "decoder_depth": config.get("decoder_num_hidden_layers", 8),
            "decoder_num_heads": config.get("decoder_num_attention_heads", 16),
            "norm_pix_loss": config.get("norm_pix_loss", False),
        }
        return {"model_config": arguments}
    if not any("Classification" in kind for kind in config.get("architectures") or []):
        return {"model_config": arguments}

    # A classifier.
    labels = config.get("id2label") or {}
    num_classes = len(labels) or config.get("num_labels", 2)
    entries = {"model_config": arguments | {"num_classes": num_classes, "global_pool": False}}
    return entries | _named_classes({int(number): name for number, name in labels.items()})


def is_model_config(config: object) -> bool:
    """Return whether an entry of a file is a `model_config` of this project's, by which a model can be built."""
    if not isinstance(config, dict) or not set(TRUNK) <= config.keys() <= {*TRUNK, *MORE_CONFIG}:
        return False
    sides = config["img_size"] if isinstance(config["img_size"], (list, tuple)) else [config["img_size"]]
    whole = [*sides, *(config[name] for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"))]
    return all(type(value) is int for value in whole) and isinstance(config.get("global_pool", False), bool)


def evaluation_settings(flags: dict, config: dict) -> tuple[Pixels, float]:
    """Return how a checkpoint's job prepares images in evaluation.

    Args:
        flags: The job's flags; {}: unknown.
        config: The model's `config`, its constructor's arguments.

    Returns:
        Channels, mean and standard deviation, and the share of the image that the centre crop keeps.
    """
    crop_pct = flags.get("crop_pct") or default_crop_pct(config["img_size"])
    return Pixels.from_args(flags, config["in_chans"]), crop_pct


def timm_config(config: dict, pixels: Pixels, crop_pct: float, classes: list[str] | None) -> dict:
    """Return the config.json from which timm builds a model: timm's ViT-B/16, with the shape of this model.

    Args:
        config: The model's `config`, its constructor's arguments.
        pixels: Channels, mean and standard deviation of the images.
        crop_pct: Share of the image that evaluation's centre crop keeps.
        classes: Names of the classes; None: the model has no head.
    """
    # "token" classifies by the class token, "avg" by the mean of the patch tokens.
    pool = "avg" if config.get("global_pool") else "token"
    description = {
        "architecture": "vit_base_patch16_224",  # any ViT will do: model_args change it to this model
        "num_classes": len(classes or ()),
        "num_features": config["embed_dim"],
        "global_pool": pool,
        "model_args": {name: config[name] for name in TRUNK} | {"global_pool": pool},
        "pretrained_cfg": timm_pretrained_cfg(config, pixels, crop_pct, len(classes or ())),
    }
    return description | ({"label_names": classes} if classes else {})


def timm_pretrained_cfg(config: dict, pixels: Pixels, crop_pct: float, num_classes: int) -> dict:
    """Return timm's description of how a model's images are prepared, from which timm.data makes a transform.

    Args:
        config: The model's `config`, its constructor's arguments.
        pixels: Channels, mean and standard deviation of the images.
        crop_pct: Share of the image that evaluation's centre crop keeps.
        num_classes: Outputs of the head; 0: the model has none.
    """
    return {
        "input_size": [config["in_chans"], *to_2tuple(config["img_size"])],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": pixels.mean,
        "std": pixels.std,
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def from_export_config(config: dict) -> dict:
    """Return the checkpoint entries that follow from the config.json of main_export.py, or of timm.

    Returns:
        "model_config", where all of a model is described, as by main_export.py --to timm or --to encoder; else
        "described", those arguments of timm's model that are stated. Beside it "class_to_idx" for a classifier whose
        classes have names. {} for other configurations.
    """
    arguments = config.get("model_args") or config
    if not all(name in arguments for name in TRUNK):
        if "architecture" not in config:
            return {}
        stated = {"global_pool": config.get("global_pool")} | (config.get("model_args") or {})
        described = {name: stated[name] for name in ("img_size", "num_heads", "global_pool") if stated.get(name)}
        return {"described": described} | _named_classes(dict(enumerate(config.get("label_names") or [])))
    model_config = {name: arguments[name] for name in TRUNK}
    model_config["num_classes"] = config.get("num_classes", 0)
    model_config["global_pool"] = arguments.get("global_pool") in (True, "avg")
    return {"model_config": model_config} | _named_classes(dict(enumerate(config.get("label_names") or [])))


def _named_classes(names: dict[int, str]) -> dict[str, dict[str, int]]:
    """Return the checkpoint entry "class_to_idx" of classes by number; {} where they have made-up names.

    transformers calls them LABEL_0, LABEL_1, ... where none are given.
    """
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return {}
    # Names that occur twice, such as ImageNet's two cranes, are told apart by their numbers.
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    return {"class_to_idx": {f"{name} ({n})" if name in twice else name: n for n, name in names.items()}}


def preprocessing(folder: Path, config: dict) -> dict:
    """Return the --mean, --std and --crop_pct that the model in a folder was made with, as far as they are stated.

    Args:
        folder: Folder that Hugging Face, timm or main_export.py wrote.
        config: The content of its config.json.
    """
    # Hugging Face has a file of its own for them, which states the crop by two sizes.
    processor = read_config(folder, "preprocessor_config.json")
    if processor and "model_type" in config:
        channels = config.get("num_channels", 3)
        config = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
        if not processor.get("do_normalize", True):
            config = {"mean": 0.0, "std": 1.0}
        config = {
            name: [value] * channels if isinstance(value, (int, float)) else value for name, value in config.items()
        }
        size, crop_size = processor.get("size"), processor.get("crop_size")
        if not (crop_size and processor.get("do_center_crop", True)):
            # The whole image is resized. Here its longer side is cropped where it is not square.
            config["crop_pct"] = 1.0
        elif (
            isinstance(size, dict) and "shortest_edge" in size and isinstance(crop_size, dict) and "height" in crop_size
        ):
            edge, crop = size["shortest_edge"], crop_size["height"]
            config["crop_pct"] = crop / (edge + 0.5) if edge > crop else 1.0  # so that int(crop / crop_pct) is edge

    # timm states them in config.json.
    config = config.get("pretrained_cfg") or config
    return drop_lone({name: config[name] for name in ("mean", "std", "crop_pct") if config.get(name)})


def drop_lone(flags: dict) -> dict:
    """Return flags of preprocessing without a mean that has no standard deviation, or the other way round."""
    whole = {"mean", "std"} <= flags.keys()
    return {name: value for name, value in flags.items() if whole or name not in ("mean", "std")}


def weights_in(folder: Path) -> list[Path]:
    """Return the files of weights in a folder that Hugging Face, timm or main_export.py wrote; [] for anything else.

    They are recognised by their names: one file, or the parts that an index lists.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"  # of weights that are split over several files
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = read_config(folder, index.name).get("weight_map") or {}
            return [folder / part for part in sorted(set(parts.values()))]
    return []


def read_config(folder: Path, name: str = "config.json") -> dict:
    """Return the content of a JSON file in a folder; {} if it is missing, unreadable or not an object."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

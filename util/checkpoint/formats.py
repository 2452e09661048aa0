"""Other libraries' Vision Transformers: recognised by the names of their weights, and written under them.

ours       cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}, norm,
           fc_norm, head; mask_token, decoder_*: the reference's released files, and timm's
Hugging Face's ViTMAE and ViT, in three generations: as released (vit.encoder.layer.N.attention.attention.query),
           as in memory since transformers 5 (vit.layers.N.attention.q_proj), and as that writes decoders
           (decoder.decoder_encoder.layer.N)
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Hugging Face's older words, and its newer ones; in this order.
GENERATIONS = (
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"attention\.attention\.(query|key|value)\.", lambda found: f"attention.{found[1][0]}_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
# Their newer words and ours: first the whole names, then what follows a block's number.
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
IN_BLOCKS = {
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Ours, and those of Hugging Face's released files.
RELEASED = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")
TRUNK = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")  # what makes an encoder


class Found(NamedTuple):
    """What a file was recognised as, its weights under our names, and the names of those that have no place here."""

    kind: str
    state: dict[str, Tensor]
    left_out: list[str]


def recognise(state: dict[str, Tensor]) -> Found:
    """The weights under our names; kind "" where they are under them already, or nothing is known about them."""
    if not any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        return Found("", state, [])
    found, left_out, parts = {}, [], {}
    for name, value in state.items():
        newer = name
        for pattern, word in GENERATIONS:
            newer = re.sub(pattern, word, newer)
        block = re.fullmatch(r"(decoder\.decoder_)?layers\.(\d+)\.(.+)\.(weight|bias)", newer)
        stem, _, kind = newer.rpartition(".")
        if block:
            prefix, inside = f"{'decoder_' if block[1] else ''}blocks.{block[2]}.", block[3]
            if inside in IN_BLOCKS:
                found[f"{prefix}{IN_BLOCKS[inside]}.{block[4]}"] = value
            elif inside.startswith("attention.") and inside.endswith("_proj"):
                parts.setdefault(f"{prefix}attn.qkv.{block[4]}", {})[inside[len("attention.")]] = value
            else:
                left_out.append(name)
        elif newer in NAMES:
            found[NAMES[newer]] = value
        elif stem in NAMES:
            found[f"{NAMES[stem]}.{kind}"] = value
        else:
            left_out.append(name)
    found |= {name: torch.cat([three[x] for x in "qkv"]) for name, three in parts.items() if len(three) == 3}
    return Found(f"Hugging Face's {'ViTMAE' if 'mask_token' in found else 'ViT'}", found, left_out)


def describe(checkpoint: dict) -> str:
    """What a checkpoint was recognised as, in words."""
    state = checkpoint["model"]
    parts = [
        name
        for name, there in (
            ("encoder", "cls_token" in state),
            ("decoder", "decoder_pred.weight" in state),
            ("head", any(name.startswith("head.") for name in state)),
        )
        if there
    ]
    whose = checkpoint.get("format") or (
        f"main_{checkpoint['job']}.py's" if "job" in checkpoint else "in the reference's and timm's names"
    )
    return f"{whose}, {' and '.join(parts) or 'nothing known'}"


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of Hugging Face's released files."""
    theirs = {ours: name for name, ours in NAMES.items()}
    found = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block:
            prefix = f"decoder.decoder_layers.{block[2]}." if block[1] else f"vit.encoder.layer.{block[2]}."
            if block[3] == "attn.qkv":
                for word, part in zip(QKV, value.chunk(3), strict=True):
                    found[f"{prefix}attention.attention.{word}.{block[4]}"] = part.clone()
            else:
                found[f"{prefix}{RELEASED[block[3]]}.{block[4]}"] = value
            continue
        new = theirs[name] if name in theirs else f"{theirs[stem]}.{kind}"
        found[new if new.startswith(("decoder.", "classifier.")) else f"vit.{new}"] = value
    return found


def hugging_face_config(config: dict, classes: list[str] | None, mask_ratio: float) -> dict:
    """config.json of a model of ours: a classifier's with its classes, else an autoencoder's."""
    found = {
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
    if classes is not None:
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **found,
            "id2label": {str(number): name for number, name in enumerate(classes)},
            "label2id": {name: number for number, name in enumerate(classes)},
        }
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **found,
        "decoder_hidden_size": config["decoder_embed_dim"],
        "decoder_num_hidden_layers": config["decoder_depth"],
        "decoder_num_attention_heads": config["decoder_num_heads"],
        "decoder_intermediate_size": int(config["decoder_embed_dim"] * config["mlp_ratio"]),
        "mask_ratio": mask_ratio,
        "norm_pix_loss": config["norm_pix_loss"],
    }


def from_hugging_face_config(config: dict) -> dict:
    """What a checkpoint of ours would hold of such a model: model_config, and a classifier's class_to_idx."""
    arguments = {
        "img_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
    }
    arguments["mlp_ratio"] = config.get("intermediate_size", 3072) / arguments["embed_dim"]
    if "decoder_hidden_size" in config:
        arguments |= {
            "decoder_embed_dim": config["decoder_hidden_size"],
            "decoder_depth": config["decoder_num_hidden_layers"],
            "decoder_num_heads": config["decoder_num_attention_heads"],
            "norm_pix_loss": config["norm_pix_loss"],
        }
        return {"model_config": arguments}
    names = config.get("id2label") or {}
    if not any("Classification" in kind for kind in config.get("architectures") or []):
        return {"model_config": arguments}
    made_up = all(name == f"LABEL_{number}" for number, name in names.items())
    found = {"model_config": arguments | {"num_classes": len(names), "global_pool": False}}
    return found if made_up else found | {"class_to_idx": {name: int(number) for number, name in names.items()}}


def from_our_config(config: dict) -> dict:
    """The same of what main_export.py writes --to timm and encoder; {} for other descriptions."""
    arguments = config.get("model_args") or config
    if not all(name in arguments for name in TRUNK):
        return {}
    found = {name: arguments[name] for name in TRUNK} | {"num_classes": config.get("num_classes", 0)}
    names = config.get("label_names")
    return {"model_config": found | {"global_pool": arguments.get("global_pool") in (True, "avg")}} | (
        {"class_to_idx": {name: number for number, name in enumerate(names)}} if names else {}
    )


def preprocessing(folder: Path, config: dict) -> dict:
    """--mean, --std and --crop_pct that a folder's model was made with, as far as it says."""
    described = read_config(folder, "preprocessor_config.json")
    if described and "model_type" in config:
        config = {"mean": described.get("image_mean"), "std": described.get("image_std")}
        whole, cut = (described.get(name) for name in ("size", "crop_size"))
        if isinstance(whole, dict) and "shortest_edge" in whole and isinstance(cut, dict) and "height" in cut:
            side, kept = whole["shortest_edge"], cut["height"]
            config["crop_pct"] = kept / (side + 0.5) if side > kept else 1.0  # so that int(kept / crop_pct) is side
    config = config.get("pretrained_cfg") or config
    return {name: config[name] for name in ("mean", "std", "crop_pct") if config.get(name)}


def weights_in(folder: Path) -> list[Path]:
    """The files of weights of a folder as Hugging Face and timm write them; none: it isn't one."""
    for name in ("model.safetensors", "encoder.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = read_config(folder, index.name).get("weight_map") or {}
            return [folder / part for part in sorted(set(parts.values()))]
    return []


def read_config(folder: Path, name: str = "config.json") -> dict:
    """A folder's description; {} where there is none, or none that can be read."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""Descriptions of models: the `model_config` of this project's checkpoints, and other libraries' config.json."""

import json
from collections import Counter
from pathlib import Path

from timm.layers import to_2tuple

from util.data.images import PixelSpec
from util.data.transforms import default_crop_pct

# The arguments that define an encoder.
ENCODER_ARGUMENTS = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
# What else the `model_config` of a checkpoint of this project may hold.
MORE_CONFIG = {
    *("model", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss"),
    *("num_classes", "global_pool", "drop_path_rate", "probe", "probe_heads"),
}
# Names of the file of weights in a folder of Hugging Face's, timm's or main_export.py's.
WEIGHT_FILES = ("model.safetensors", "encoder.safetensors", "pytorch_model.bin")


def known_config(checkpoint: dict) -> dict:
    """Return those arguments of its model that a checkpoint tells: all, some of them (timm's folders), or none ({})."""
    return checkpoint.get("model_config") or checkpoint.get("described") or {}


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
    if not isinstance(config, dict) or not set(ENCODER_ARGUMENTS) <= config.keys() <= {
        *ENCODER_ARGUMENTS,
        *MORE_CONFIG,
    }:
        return False
    sides = config["img_size"] if isinstance(config["img_size"], (list, tuple)) else [config["img_size"]]
    whole = [*sides, *(config[name] for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"))]
    return all(type(value) is int for value in whole) and isinstance(config.get("global_pool", False), bool)


def evaluation_settings(flags: dict, config: dict) -> tuple[PixelSpec, float]:
    """Return how a checkpoint's job prepares images in evaluation.

    Args:
        flags: The job's flags; {}: unknown.
        config: The model's `config`, its constructor's arguments.

    Returns:
        Channels, mean and standard deviation, and the share of the image that the centre crop keeps.
    """
    crop_pct = flags.get("crop_pct") or default_crop_pct(config["img_size"])
    return PixelSpec.from_args(flags, config["in_chans"]), crop_pct


def timm_config(config: dict, pixels: PixelSpec, crop_pct: float, classes: list[str] | None) -> dict:
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
        "model_args": {name: config[name] for name in ENCODER_ARGUMENTS} | {"global_pool": pool},
        "pretrained_cfg": timm_pretrained_cfg(config, pixels, crop_pct, len(classes or ())),
    }
    return description | ({"label_names": classes} if classes else {})


def timm_pretrained_cfg(config: dict, pixels: PixelSpec, crop_pct: float, num_classes: int) -> dict:
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
    if not all(name in arguments for name in ENCODER_ARGUMENTS):
        if "architecture" not in config:
            return {}
        stated = {"global_pool": config.get("global_pool")} | (config.get("model_args") or {})
        described = {name: stated[name] for name in ("img_size", "num_heads", "global_pool") if stated.get(name)}
        return {"described": described} | _named_classes(dict(enumerate(config.get("label_names") or [])))
    model_config = {name: arguments[name] for name in ENCODER_ARGUMENTS}
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


def preprocessor_config(side: int, pixels: PixelSpec, crop_pct: float) -> dict:
    """Return Hugging Face's preprocessor_config.json: the resizing, cropping and normalisation of evaluation.

    Args:
        side: Height and width of the model's images in pixels.
        pixels: Mean and standard deviation of the images.
        crop_pct: Share of the image that the centre crop keeps.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(side / crop_pct)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels.mean,
        "image_std": pixels.std,
    }


def preprocessing(folder: Path, config: dict) -> dict:
    """Return the --mean, --std, --crop_pct and --exif that the model in a folder was made with, as far as stated.

    Args:
        folder: Folder that Hugging Face, timm or main_export.py wrote.
        config: The content of its config.json.
    """
    # Hugging Face has a file of its own for them; timm states them in config.json.
    processor = read_config(folder, "preprocessor_config.json")
    if processor and "model_type" in config:
        stated = _hugging_face_preprocessing(processor, config.get("num_channels", 3))
    else:
        stated = config.get("pretrained_cfg") or config
    found = {name: stated[name] for name in ("mean", "std", "crop_pct") if stated.get(name)}
    found |= {"exif": True} if config.get("exif") is True else {}  # main_export.py's; other libraries ignore it
    return drop_incomplete_normalisation(found)


def _hugging_face_preprocessing(processor: dict, channels: int) -> dict:
    """Return mean, std and crop_pct of a preprocessor_config.json: the inverse of `preprocessor_config`."""
    normalisation = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if not processor.get("do_normalize", True):
        normalisation = {"mean": 0.0, "std": 1.0}
    stated = {
        name: [value] * channels if isinstance(value, (int, float)) else value for name, value in normalisation.items()
    }

    # The crop is stated by two sizes. Without one the whole image is resized; here its longer side is cropped then.
    size, crop_size = processor.get("size"), processor.get("crop_size")
    if not (crop_size and processor.get("do_center_crop", True)):
        return stated | {"crop_pct": 1.0}
    if isinstance(size, dict) and "shortest_edge" in size and isinstance(crop_size, dict) and "height" in crop_size:
        edge, crop = size["shortest_edge"], crop_size["height"]
        stated["crop_pct"] = crop / (edge + 0.5) if edge > crop else 1.0  # so that int(crop / crop_pct) is edge
    return stated


def drop_incomplete_normalisation(flags: dict) -> dict:
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

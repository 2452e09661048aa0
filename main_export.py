"""Take a model elsewhere: weights and the description that the other library reads, with a model card.

    python main_export.py --resume output/pretrain/checkpoint-399.pth --to timm --output exported

--to timm       model.safetensors, config.json: timm.create_model("local-dir:exported", pretrained=True)
     hf         the same for Hugging Face: ViTMAEForPreTraining.from_pretrained("exported") of an autoencoder,
                ViTForImageClassification of a classifier on the class token; preprocessor_config.json
     encoder    the encoder alone under the reference's names, as in its released files, and config.json
     onnx       model.onnx, of images [N, C, H, W], normalised: a classifier's logits, else the encoder's tokens
A linear probe's BatchNorm becomes part of its linear layer; of a sweep's heads the best one goes out. With --model_ema
the running average is exported.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

import models_mae
import models_vit
from util import errors
from util.checkpoint import formats
from util.checkpoint.files import checkpoint_args, load_checkpoint
from util.checkpoint.output_dir import unwritable
from util.data.images import Pixels
from util.data.transforms import default_crop_pct
from util.errors import UserError


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from argv or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="checkpoint of any of the jobs, or anything --finetune reads")
    add("--to", required=True, choices=("timm", "hf", "encoder", "onnx"))
    add("--output", required=True, type=Path, metavar="DIR")
    add("--model_ema", action="store_true", help="the running average of the weights")
    add("--license", default="unknown", help="of the weights, for the model card")
    return parser.parse_args(argv)


def fold_probe(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """A linear probe's normalisation and head as one linear layer, under head.weight and head.bias."""
    if "probe" not in config:
        return state
    weight, bias = state["head.1.weight"], state["head.1.bias"]
    scale = (state["head.0.running_var"] + 1e-6).rsqrt()
    folded = {name: value for name, value in state.items() if not name.startswith("head.")}
    return folded | {"head.weight": weight * scale, "head.bias": bias - weight @ (state["head.0.running_mean"] * scale)}


def timm_config(config: dict, pixels: Pixels, crop_pct: float, classes: list[str] | None) -> dict:
    """config.json of a model in timm's form: an architecture of its own, and what is different here."""
    size, pool = to_2tuple(config["img_size"]), "avg" if config.get("global_pool") else "token"
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": len(classes or ()),
        "num_features": config["embed_dim"],
        "global_pool": pool,
        "model_args": {name: config[name] for name in models_vit.TRUNK} | {"global_pool": pool},
        "pretrained_cfg": {
            "input_size": [config["in_chans"], *size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": pixels.mean,
            "std": pixels.std,
            "num_classes": len(classes or ()),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **({"label_names": classes} if classes else {}),
    }


def preprocessor_config(side: int, pixels: Pixels, crop_pct: float) -> dict:
    """preprocessor_config.json: evaluation's resizing, cutting and normalising."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(side / crop_pct)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels.mean,
        "image_std": pixels.std,
    }


def to_hf(
    folder: Path,
    state: dict[str, Tensor],
    config: dict,
    pixels: Pixels,
    crop_pct: float,
    classes: list[str] | None,
    mask_ratio: float,
    source: str,
) -> None:
    """Raises UserError where Hugging Face's models can't be what this one is."""
    size = to_2tuple(config["img_size"])
    why = ""
    if size[0] != size[1]:
        why = f"it is for {size[0]} x {size[1]} pixels; Hugging Face's ViTMAE and ViT are for squares"
    elif classes and (config.get("global_pool") or config.get("probe") == "attentive"):
        why = "it pools the patches, and Hugging Face's ViT classifies the class token: train it with --cls_token"
    elif classes is None and "mask_token" not in state:
        why = "it has neither a decoder (ViTMAEForPreTraining) nor a head (ViTForImageClassification)"
    if why:
        raise UserError(f"{source} can't go to Hugging Face: {why}. --to timm or --to onnx can take it")
    config = config | {"img_size": size[0]}
    described = formats.hugging_face_config(config, classes, mask_ratio)
    save(folder, formats.to_hugging_face(state), described)
    write_json(folder / "preprocessor_config.json", preprocessor_config(size[0], pixels, crop_pct))


def to_onnx(path: Path, model: nn.Module, size: tuple[int, int], channels: int) -> None:
    """Raises UserError where the packages are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}: pip install onnx onnxscript") from error
    example = torch.zeros(2, channels, *size)
    program = torch.onnx.export(
        model.eval(),
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    program.save(path)


def save(folder: Path, state: dict[str, Tensor], config: dict, name: str = "model.safetensors") -> None:
    """Weights and config.json; what another --to left in the folder goes."""
    for other in ("model.safetensors", "encoder.safetensors", "preprocessor_config.json"):
        (folder / other).unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def card(checkpoint: dict, args: argparse.Namespace, classes: list[str] | None) -> str:
    """The model card: what the checkpoint says of its data, recipe and figures."""
    flags, stats = checkpoint_args(checkpoint), checkpoint.get("stats") or {}
    job = {"pretrain": "masked pre-training", "finetune": "fine-tuning", "linprobe": "linear probing"}
    usage = {
        "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
        "hf": f"model = transformers.{'ViTForImageClassification' if classes else 'ViTMAEForPreTraining'}"
        '.from_pretrained("FOLDER")',
        "encoder": 'state = safetensors.torch.load_file("FOLDER/encoder.safetensors")   # the released files\' names',
        "onnx": 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")   # images [N, C, H, W], normalised',
    }[args.to]
    lines = [
        "---",
        f"license: {args.license}",
        *({"timm": ["library_name: timm"], "hf": ["library_name: transformers"]}.get(args.to, [])),
        "tags: [masked-autoencoder, vision-transformer]",
        "---",
        "",
        f"# {(checkpoint.get('model_config') or {}).get('model', 'Vision Transformer')}",
        "",
        "Masked autoencoding: He et al., *Masked Autoencoders Are Scalable Vision Learners*, arXiv 2111.06377.",
        "",
        "```python",
        usage,
        "```",
        "",
        "| | |",
        "|---|---|",
    ]
    known = {
        "trained by": job.get(checkpoint.get("job")),
        "data": Path(flags["data_path"]).name if flags.get("data_path") else None,
        "images": flags.get("input_size"),
        "mean, std of pixels": f"{flags['mean']}, {flags['std']}" if flags.get("mean") else None,
        "epochs": checkpoint["epoch"] + 1 if isinstance(checkpoint.get("epoch"), int) else None,
        "mask ratio": flags.get("mask_ratio"),
        "targets normalised": flags.get("norm_pix_loss"),
        "started from": Path(flags["finetune"]).name if flags.get("finetune") else None,
        "effective batch": effective_batch(flags),
        "classes": len(classes) if classes else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime(checkpoint["saved"])) if "saved" in checkpoint else None,
        **{name: f"{value:.6g}" for name, value in stats.items() if isinstance(value, float) and _is_its(name, args)},
    }
    lines += [f"| {name} | {value} |" for name, value in known.items() if value is not None]
    recipe = " ".join(f"--{name} {value}" for name, value in flags.items() if name in RECIPE and value is not None)
    return "\n".join([*lines, "", *(["Recipe: `" + recipe + "`", ""] if recipe else [])])


def _is_its(figure: str, args: argparse.Namespace) -> bool:
    """Whether one of the last epoch's figures is of the weights that are exported, not of another average or head."""
    return "_blr" not in figure and (not figure.startswith("test_") or args.model_ema == figure.startswith("test_ema_"))


RECIPE = (
    "model",
    "batch_size",
    "accum_iter",
    "world_size",
    "epochs",
    "warmup_epochs",
    "lr",
    "blr",
    "min_lr",
    "weight_decay",
    "layer_decay",
    "drop_path",
    "clip_grad",
    "crop_scale",
    "mask_sampling",
    "aa",
    "smoothing",
    "reprob",
    "mixup",
    "cutmix",
    "probe",
    "train_fraction",
    "trainable_blocks",
    "seed",
)


def effective_batch(flags: dict) -> int | None:
    names = ("batch_size", "accum_iter", "world_size")
    return flags["batch_size"] * flags["accum_iter"] * flags["world_size"] if all(n in flags for n in names) else None


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Export (argv defaults to the command line's)."""
    args = get_args(argv)
    if why := unwritable(str(args.output)):
        raise UserError(f"--output {args.output} can't be written to: {why}")
    checkpoint = load_checkpoint(args.resume, ema=args.model_ema)
    is_mae = "decoder_pred.weight" in checkpoint["model"]
    has_head = any(name.startswith("head.") for name in checkpoint["model"])
    if is_mae:
        model = models_mae.from_checkpoint(checkpoint, args.resume)
    else:
        model = models_vit.from_checkpoint(checkpoint, args.resume, trunk_only=not has_head)
    config, state = model.config, model.state_dict()
    names = checkpoint.get("class_to_idx")
    classes = None
    if has_head:
        width = config["num_classes"]
        classes = sorted(names, key=names.get) if names else [f"LABEL_{number}" for number in range(width)]
    flags = checkpoint_args(checkpoint)
    pixels = Pixels.of(flags, config["in_chans"])
    crop_pct = flags.get("crop_pct") or default_crop_pct(config["img_size"])
    if config.get("probe") == "attentive" and args.to in ("timm", "hf"):
        raise UserError(f"{args.resume} is an attentive probe, which only --to onnx can take, its encoder --to encoder")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.to == "hf":
        folded = fold_probe(state, config)
        to_hf(args.output, folded, config, pixels, crop_pct, classes, flags.get("mask_ratio", 0.75), args.resume)
    elif args.to == "timm":
        trunk = encoder(checkpoint, args.resume) if is_mae else model
        save(args.output, fold_probe(trunk.state_dict(), config), timm_config(trunk.config, pixels, crop_pct, classes))
    elif args.to == "encoder":
        trunk = encoder(checkpoint, args.resume)
        described = {**trunk.config, "mean": pixels.mean, "std": pixels.std, "crop_pct": crop_pct}
        save(args.output, trunk.state_dict(), described, "encoder.safetensors")
    else:
        whole = model if has_head else encoder(checkpoint, args.resume)
        if not has_head:
            whole.global_pool, whole.fc_norm = "", nn.Identity()  # so that it gives the tokens, [N, 1+L, D]
        to_onnx(args.output / "model.onnx", whole, to_2tuple(config["img_size"]), config["in_chans"])
    (args.output / "README.md").write_text(card(checkpoint, args, classes), encoding="utf-8")
    print(f"{args.resume} as {args.to} in {args.output}")


def encoder(checkpoint: dict, source: str) -> models_vit.VisionTransformer:
    """The encoder alone, whose tokens pass through `norm` where the file has one."""
    return models_vit.from_checkpoint(checkpoint, source, trunk_only=True)


if __name__ == "__main__":
    errors.run(main)

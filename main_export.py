"""Export a checkpoint for another library: its weights, the configuration that the library reads, and a model card.

    python main_export.py --resume output/pretrain/checkpoint-399.pth --to timm --output exported

--to timm       model.safetensors and config.json: timm.create_model("local-dir:exported", pretrained=True)
     hf         likewise, and preprocessor_config.json: ViTMAEForPreTraining.from_pretrained("exported") for an
                autoencoder, ViTForImageClassification for a classifier on the class token, ViTModel for an encoder
     encoder    encoder.safetensors, the encoder alone under the released files' parameter names, and config.json
     onnx       model.onnx, which takes normalised images [N, C, H, W] and returns a classifier's logits [N, classes],
                or an encoder's tokens [N, 1+L, D]; and config.json, with the preprocessing and the names of the classes

The BatchNorm of a linear probe is folded into its linear layer; of a learning-rate sweep the best head is exported.
With --model_ema the EMA of the weights is exported.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

import models_load
import models_vit
from util import errors, inference
from util.checkpoint import comparison, configurations, formats
from util.checkpoint.classes import resolve_class_names
from util.checkpoint.files import checkpoint_args, effective_batch, is_url, load_checkpoint
from util.command_line import Parser
from util.data.class_names import read_class_names
from util.data.images import PixelSpec
from util.disk import UNFINISHED, fsync_path, output_path, raise_write_errors, unwritable
from util.errors import UserError

# Files that tell a library that a folder holds a model for it.
EXPORTED = (
    *("model.safetensors", "encoder.safetensors", "model.onnx", "model.onnx.data"),
    *("config.json", "preprocessor_config.json"),
)
# By these words of its README.md an earlier export is recognised, which may be replaced.
CREDIT = "Masked autoencoding: He et al., *Masked Autoencoders Are"
# Flags that the model card repeats as the recipe.
RECIPE = {
    *("model", "input_size", "patch_size", "in_chans", "decoder_dim", "decoder_depth", "decoder_heads"),
    *("mask_ratio", "mask_sampling", "norm_pix_loss", "probe", "trainable_blocks", "global_pool", "drop_path"),
    *("batch_size", "accum_iter", "world_size", "epochs", "warmup_epochs", "seed", "amp"),
    *("lr", "blr", "min_lr", "weight_decay", "layer_decay", "clip_grad", "model_ema", "model_ema_decay"),
    *("train_fraction", "val_fraction", "val_seed", "class_weights", "exif", "crop_pct", "crop_scale", "smoothing"),
    *("aa", "color_jitter", "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax"),
    *("mixup_prob", "mixup_switch_prob", "mixup_mode"),
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags (argv defaults to the command line's)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CKPT", help="checkpoint of any of the jobs, or anything --finetune reads")
    add("--to", required=True, choices=tuple(EXPORTERS), help="format to export, described above")
    add("--output", required=True, type=output_path, metavar="DIR", help="folder to write")
    add("--model_ema", action="store_true", help="export the EMA of the weights")
    inference.add_norm_pix_loss(parser)
    inference.add_class_names(parser)
    add("--license", default="unknown", help="licence of the weights, for the model card")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Source:
    """Checkpoint to export, with its model and the facts that the formats' configurations repeat.

    Attributes:
        path: File, folder or address of the checkpoint.
        checkpoint: Its content.
        model: What is exported: the classifier or the encoder that it holds, or for Hugging Face its autoencoder.
        flags: Flags of the job that wrote it; {}: unknown.
        pixels: Channels of the images, with mean and standard deviation.
        crop_pct: Share of the image that evaluation's centre crop keeps.
        classes: Names of the classes in the order of the logits (LABEL_0, LABEL_1, ... if the checkpoint has no names);
            None: the model has no head.
    """

    path: str
    checkpoint: dict
    model: nn.Module
    flags: dict
    pixels: PixelSpec
    crop_pct: float
    classes: list[str] | None

    @classmethod
    def load(cls, args: argparse.Namespace, names: list[str] | None) -> "Source":
        """Load a checkpoint and build its model.

        Args:
            args: The flags, which name the checkpoint, its weights and the format.
            names: Names of the classes; None: those in the checkpoint.

        Raises:
            UserError: There is no such checkpoint, no EMA in it, no model that can be built from it, or no head for
                the names.
        """
        path, checkpoint = args.resume, load_checkpoint(args.resume, ema=args.model_ema)

        # Only Hugging Face has a model for a decoder. For the others it may be of a kind that is not known here.
        has_head = comparison.has_head(checkpoint["model"])
        if has_head:
            model = models_load.classifier(checkpoint, path)
        elif args.to == "hf" and formats.has_decoder(checkpoint["model"]):
            model = models_load.autoencoder(checkpoint, path, args.norm_pix_loss)
        else:
            model = models_load.encoder(checkpoint, path)
        config = model.config

        # Files of other programs may hold a head without the names of its classes.
        classes = None
        if has_head:
            numbered = [f"LABEL_{number}" for number in range(config["num_classes"])]
            classes = resolve_class_names(path, checkpoint, config["num_classes"], names) or numbered
        elif names:
            raise UserError(f"{path} has no head, so there are no classes to name: omit --class_names")

        flags = checkpoint_args(checkpoint)
        pixels, crop_pct = configurations.evaluation_settings(flags, config)
        return cls(path, checkpoint, model, flags, pixels, crop_pct, classes)

    @property
    def config(self) -> dict:
        """Return the arguments that build the model."""
        return self.model.config

    @property
    def img_size(self) -> tuple[int, int]:
        """Return height and width of the model's images in pixels."""
        return to_2tuple(self.config["img_size"])

    @property
    def exif(self) -> dict[str, bool]:
        """Return what config.json says about EXIF orientation: nothing, unless images were rotated by it."""
        return {"exif": True} if self.flags.get("exif") is True else {}


def fold_probe(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Fold a probe's BatchNorm into its linear layer, then named head.weight and head.bias.

    The weights of a model that is no probe are returned unchanged.

    The BatchNorm has no learned scale or shift, so that head(x) = W (x - mean) / sqrt(var + eps) + b.
    """
    if "probe" not in config:
        return state
    weight, bias = state["head.1.weight"], state["head.1.bias"]
    scale = (state["head.0.running_var"] + models_vit.PROBE_EPS).rsqrt()
    folded = {name: value for name, value in state.items() if not name.startswith("head.")}
    folded["head.weight"] = weight * scale
    folded["head.bias"] = bias - weight @ (state["head.0.running_mean"] * scale)
    return folded


def to_timm(folder: Path, source: Source) -> None:
    """Write the classifier, or else the encoder, for timm."""
    description = configurations.timm_config(source.config, source.pixels, source.crop_pct, source.classes)
    save(folder, fold_probe(source.model.state_dict(), source.config), description | source.exif)


def to_hf(folder: Path, source: Source) -> None:
    """Write an autoencoder as Hugging Face's ViTMAE, a classifier or an encoder alone as its ViT.

    Raises:
        UserError: Hugging Face has no model that computes the same.
    """
    state, (height, width) = fold_probe(source.model.state_dict(), source.config), source.img_size

    # Hugging Face has one size for height and width, and no classifier that pools the patch tokens.
    problem = ""
    if height != width:
        problem = f"it is for {height} x {width} pixels; Hugging Face's ViTMAE and ViT are for squares"
    elif source.classes and source.config.get("global_pool"):
        problem = "it pools the patches, and Hugging Face's ViT classifies the class token: train it with --cls_token"
    elif source.classes is None and "norm.weight" not in state:
        problem = "its encoder has no final LayerNorm (norm), which Hugging Face's ViT always has"
    if problem:
        raise UserError(
            f"{source.path} cannot be exported to Hugging Face: {problem}. Use --to timm or --to onnx instead"
        )

    config = source.config | {"img_size": height}
    description = configurations.hugging_face_config(config, source.classes, source.flags.get("mask_ratio", 0.75))
    save(folder, formats.to_hugging_face(state), description | source.exif)
    settings = configurations.preprocessor_config(height, source.pixels, source.crop_pct)
    write_json(folder / "preprocessor_config.json", settings)


def to_encoder(folder: Path, source: Source) -> None:
    """Write the encoder under the released names, and config.json with its shape, mean, std and crop_pct."""
    encoder = models_load.encoder(source.checkpoint, source.path) if source.classes else source.model
    pixels = {"mean": source.pixels.mean, "std": source.pixels.std, "crop_pct": source.crop_pct}
    save(folder, encoder.state_dict(), encoder.config | pixels | source.exif, "encoder.safetensors")


def to_onnx(folder: Path, source: Source) -> None:
    """Write the classifier, or else the encoder, which returns all tokens, as an ONNX graph for any number of images.

    Raises:
        UserError: A package that the export needs is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install onnx onnxscript")

    model = source.model
    if source.classes is None:
        model.global_pool, model.fc_norm = "", nn.Identity()  # so that it returns all tokens, [N, 1+L, D]

    # Two images, since a batch of one would be taken for a constant.
    example = torch.zeros(2, source.config["in_chans"], *source.img_size)
    program = torch.onnx.export(
        model.eval(),
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    program.save(folder / "model.onnx")
    description = configurations.timm_config(source.config, source.pixels, source.crop_pct, source.classes)
    write_json(folder / "config.json", description | source.exif)


def save(folder: Path, state: dict[str, Tensor], config: dict, name: str = "model.safetensors") -> None:
    """Write weights and config.json.

    Args:
        folder: Existing folder.
        state: Weights by parameter name.
        config: Content of config.json.
        name: File name of the weights.
    """
    write_json(folder / "config.json", config)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / name)  # safetensors lets the owner alone read its files


def refuse_to_replace(source: str, folder: Path) -> None:
    """Check that an export to a folder would replace nothing, or only an earlier export.

    An earlier export is recognised by its README.md.

    Raises:
        UserError: It would replace or remove the checkpoint that is exported, or another program's files.
    """
    path = Path(source).resolve()
    if not is_url(source) and (path == folder.resolve() or (path.parent == folder.resolve() and path.name in EXPORTED)):
        raise UserError(f"--output {folder} would replace --resume {source} itself: choose another folder")
    readme = folder / "README.md"
    if readme.is_file() and CREDIT in readme.read_text(encoding="utf-8", errors="replace"):
        return
    there = [name for name in (*EXPORTED, readme.name) if (folder / name).exists()]
    if there:
        raise UserError(
            f"--output {folder} holds {there[0]}, which is not of an earlier export and would be replaced: choose "
            "another folder"
        )


@contextmanager
def replace_export(folder: Path) -> Iterator[Path]:
    """Return a context that gives an empty folder to write an export to; at its end the files move into `folder`.

    Files of an earlier export that the new one does not have are removed then. After an error the earlier export is as
    it was, and a folder that did not exist before is gone.

    Args:
        folder: Folder of the export; it is made if needed.

    Raises:
        UserError: It can't be written.
    """
    existed = folder.exists()
    with raise_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as name:
            unfinished = Path(name)
            try:
                yield unfinished
            except BaseException:
                if not existed:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    with suppress(OSError):  # another program has written there meanwhile
                        folder.rmdir()
                raise
            files = [path.name for path in unfinished.iterdir()]
            for file in files:
                fsync_path(unfinished / file)
            for file in files:
                os.replace(unfinished / file, folder / file)
            fsync_path(folder)
            for earlier in set(EXPORTED) - set(files):
                (folder / earlier).unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write a dictionary as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def card(source: Source, args: argparse.Namespace) -> str:
    """Return the model card in Markdown: how to load the model, and its data, recipe and figures, as far as known."""
    library = {"timm": "timm", "hf": "transformers"}.get(args.to)
    model_name = (source.checkpoint.get("model_config") or {}).get("model", "Vision Transformer")

    # Front matter, which the Hugging Face hub reads, and how to load the model.
    lines = [
        "---",
        f"license: {args.license}",
        *([f"library_name: {library}"] if library else []),
        "tags: [masked-autoencoder, vision-transformer]",
        "---",
        "",
        f"# {model_name}",
        "",
        f"{CREDIT} Scalable Vision Learners*, arXiv 2111.06377.",
        "",
        "```python",
        usage_example(args.to, source),
        "```",
        "",
    ]

    # Facts and figures of the training; a released file knows hardly any.
    facts = training_facts(source, args.model_ema) | exported_figures(source.checkpoint, args.model_ema)
    rows = [f"| {name} | {table_cell(value)} |" for name, value in facts.items() if value is not None]
    lines += ["| | |", "|---|---|", *rows, ""] if rows else []

    if "epochs" in source.flags:  # else they are those of the preprocessing alone
        lines += [f"Recipe: `{recipe(source.flags)}`", ""]
    return "\n".join(lines)


def recipe(flags: dict) -> str:
    """Return those of a checkpoint's flags that train such a model again, as they are typed on a command line."""
    words = []
    for name, value in flags.items():
        if name not in RECIPE or value is None or (name == "model_ema_decay" and not flags.get("model_ema")):
            continue
        if isinstance(value, bool):
            opposite = ["--cls_token"] if name == "global_pool" else []
            words += [f"--{name}"] if value else opposite
        else:
            words.append(f"--{name} {flag_value(value)}")
    return " ".join(words)


def table_cell(value: object) -> str:
    """Return a value as text for a cell of a Markdown table, in one line and with `|` escaped."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")


def flag_value(value: object) -> str:
    """Return a flag's value, or its values, as they are typed on a command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def usage_example(to: str, source: Source) -> str:
    """Return the line of Python that loads an export of this format."""
    if to == "hf":
        kind = configurations.hugging_face_class(source.config, source.classes)
        flags = ", add_pooling_layer=False" if kind == "ViTModel" else ""
        return f'model = transformers.{kind}.from_pretrained("FOLDER"{flags})'
    return {
        "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
        "encoder": 'state = safetensors.torch.load_file("FOLDER/encoder.safetensors")   # the released files\' names',
        "onnx": 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")   # images [N, C, H, W], normalised',
    }[to]


def training_facts(source: Source, ema: bool) -> dict[str, object]:
    """Return what the checkpoint tells about its training, by the card's row; None where it tells nothing.

    Of paths only the last part is repeated, since a card is published.
    """
    checkpoint, flags = source.checkpoint, source.flags
    jobs = {"pretrain": "masked pre-training", "finetune": "fine-tuning", "linprobe": "linear probing"}
    return {
        "trained by": jobs.get(checkpoint.get("job")),
        "weights": "their exponential moving average (EMA)" if ema else None,
        "data": Path(flags["data_path"]).name if flags.get("data_path") else None,
        "images": flags.get("input_size"),
        "mean, std of pixels": f"{flags['mean']}, {flags['std']}" if flags.get("mean") else None,
        "epochs": checkpoint["epoch"] + 1 if isinstance(checkpoint.get("epoch"), int) else None,
        "mask ratio": flags.get("mask_ratio"),
        "targets normalised": flags.get("norm_pix_loss"),
        "started from": Path(flags.get("finetune") or flags.get("init") or "").name or None,
        "effective batch": effective_batch(flags),
        "classes": len(source.classes) if source.classes else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime(checkpoint["saved"])) if "saved" in checkpoint else None,
    }


def exported_figures(checkpoint: dict, ema: bool) -> dict[str, str]:
    """Return the last epoch's figures of the weights that are exported.

    Test figures of the weights are left out when their EMA is exported, and the other way round. Of a sweep the best
    head's stay: those of each head (test_acc1_blr0.1, ...) and the sum of their losses are left out.
    """
    figures = {}
    sweep = isinstance(checkpoint_args(checkpoint).get("blr"), list)
    for name, value in (checkpoint.get("stats") or {}).items():
        of_other_weights = name.startswith("test_") and name.startswith("test_ema_") != ema
        of_all_heads = "_blr" in name or (sweep and name == "train_loss")
        if isinstance(value, float) and not of_all_heads and not of_other_weights:
            figures[name] = f"{value:.6g}"
    return figures


EXPORTERS = {"timm": to_timm, "hf": to_hf, "encoder": to_encoder, "onnx": to_onnx}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Export a checkpoint as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    if problem := unwritable(args.output):
        raise UserError(f"--output {args.output} can't be written to: {problem}")
    refuse_to_replace(args.resume, args.output)

    # Load everything and check what can be checked before a file is written.
    names = read_class_names(args.class_names) if args.class_names else None
    source = Source.load(args, names)
    if source.config.get("probe") == "attentive" and args.to in ("timm", "hf"):
        raise UserError(
            f"{args.resume} is an attentive probe, which only --to onnx can take: use that, or --to encoder for its "
            "encoder alone"
        )

    # Names that are not UTF-8 appear in the card with their bytes as escapes.
    with replace_export(args.output) as unfinished:
        EXPORTERS[args.to](unfinished, source)
        text = card(source, args).encode("utf-8", errors="backslashreplace")
        (unfinished / "README.md").write_bytes(text)
    print(f"{args.resume} is exported to {args.output} ({args.to}); its README.md says how to load it")


if __name__ == "__main__":
    errors.run(main)

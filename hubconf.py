"""Models for torch.hub, which calls the functions of this module by their names.

    model = torch.hub.load("FOLDER", "mae_vit_base_patch16", source="local", weights="FILE_OR_URL")

mae_vit_*    masked autoencoders: model(imgs) -> loss, pred, mask (models_mae.py)
vit_*        classifiers: model(imgs) -> logits, with the file's head, or with num_classes=N a new one (models_vit.py)
encoder      the encoder of any checkpoint: model(imgs) -> a feature per image [N, D]

`weights` is a checkpoint in any form that the jobs read. It tells the model's image size, channels and patch size;
weights=None builds a model with random values instead, and takes the constructor's arguments. Without `weights` the
model has the weights that come with this repository, where there are some for it. How its images are prepared stands
in `model.pretrained_cfg`, in timm's form:

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
"""

import collections.abc
import functools
import os
import pathlib

from torch import nn

import models_load
import models_mae
import models_vit
from util import errors
from util.checkpoint import comparison, configurations, files
from util.checkpoint import weights as loading

dependencies = ["torch", "torchvision", "timm", "safetensors"]

# The weights in this repository, by the name of the encoder.
_INCLUDED = {"demo": pathlib.Path(__file__).parent / "weights" / "mae_vit_demo_patch4_cifar10"}


def encoder(weights: str | os.PathLike = "included") -> models_vit.VisionTransformer:
    """Load the encoder of a checkpoint.

    Args:
        weights: File, folder or address of the checkpoint; default: the small encoder of this repository.

    Returns:
        The encoder, in training mode. It returns the class token after `norm` if the checkpoint has that layer, else
        the mean of the patch tokens after `fc_norm`, [N, D]; `forward_features` returns all tokens [N, 1+L, D].

    Raises:
        UserError: The weights can't be read, or are those of no encoder that the models here have.
    """
    source, checkpoint = _load("demo", weights)
    return _with_pretrained_cfg(models_load.encoder(checkpoint, source), checkpoint)


def _autoencoder(
    _name: str, weights: str | os.PathLike | None = "included", **arguments
) -> models_mae.MaskedAutoencoderViT:
    """Load a masked autoencoder, encoder and decoder.

    Args:
        weights: File, folder or address of a checkpoint with its decoder; None: random values.
        **arguments: For the constructor of a model with random values. With weights, only norm_pix_loss, for a file
            that does not tell it.

    Returns:
        The autoencoder, in training mode. For images [N, C, H, W] it returns the loss, the predictions [N, L, p*p*C]
        and the masks [N, L].

    Raises:
        UserError: The weights can't be read, or are of another size; or an argument is one that the file decides.
    """
    factory = models_mae.MODELS[_name]
    if weights is None:
        return factory(**arguments)
    source, checkpoint = _load(_name.split("_")[2], weights)
    _refuse_arguments(arguments, {"norm_pix_loss"})
    model = models_load.autoencoder(checkpoint, source, arguments.get("norm_pix_loss", False))
    _refuse_other_sizes(_name, factory.keywords, model.config, source)
    return _with_pretrained_cfg(model, checkpoint)


def _classifier(
    _name: str, weights: str | os.PathLike | None = "included", num_classes: int | None = None, **arguments
) -> models_vit.VisionTransformer:
    """Load a classifier, or put a new head on a pre-trained encoder.

    Args:
        weights: File, folder or address of a checkpoint; None: random values.
        num_classes: Outputs of a new head; None, or the number of the file's head: the head is the file's.
        **arguments: For the constructor, of a model with random values or a new head (global_pool, drop_path_rate,
            img_size, ...). A new head's model takes what is not given from the file.

    Returns:
        The classifier, in training mode. For images [N, C, H, W] it returns logits [N, classes].

    Raises:
        UserError: The weights can't be read, have no head where num_classes is None, or are of another size; or an
            argument is one that the file decides.
    """
    factory = models_vit.MODELS[_name]
    if weights is None:
        return factory(**arguments, **({} if num_classes is None else {"num_classes": num_classes}))
    source, checkpoint = _load(_name.split("_")[1], weights)
    classes = comparison.count_classes(checkpoint["model"])
    if num_classes is None or (classes == num_classes > 0 and not arguments):
        if not classes:
            raise errors.UserError(f"{source} has no head: pass num_classes=N for a new one")
        _refuse_arguments(arguments, set())
        model = models_load.classifier(checkpoint, source)
    else:
        _, stored = models_load.weights_and_config(checkpoint, source)
        kept = {argument: stored[argument] for argument in configurations.ENCODER_ARGUMENTS}
        config = checkpoint.get("model_config") or {}
        kept |= {"global_pool": config["global_pool"]} if "global_pool" in config else {}
        model = models_vit.VisionTransformer(**{**kept, **arguments, "num_classes": num_classes})
        loading.load_pretrained(source, model, checkpoint=checkpoint)
    _refuse_other_sizes(_name, factory.keywords, model.config, source)
    return _with_pretrained_cfg(model, checkpoint)


def _load(size: str, weights: str | os.PathLike | None) -> tuple[str, dict]:
    """Read a checkpoint, and return its name and its content; "included" is this repository's own for this encoder."""
    if weights is None:
        raise errors.UserError("weights=None: name a checkpoint, since an encoder of random values has no use")
    if weights == "included":
        if size not in _INCLUDED:
            raise errors.UserError(
                f"no weights of this size ({size}) come with the code: pass weights=FILE_OR_URL, or weights=None for "
                "random values"
            )
        weights = _INCLUDED[size]
    return str(weights), files.load_checkpoint(str(weights))


def _refuse_arguments(arguments: dict, allowed: set[str]) -> None:
    """Raise UserError if there are arguments that the file decides."""
    surplus = ", ".join(sorted(set(arguments) - allowed))
    if surplus:
        raise errors.UserError(f"{surplus}: the file decides that; omit it, or pass weights=None for random values")


def _refuse_other_sizes(name: str, expected: dict, config: dict, source: str) -> None:
    """Raise UserError if a checkpoint's encoder is not of the size that the model's name promises."""
    asked, there = ([sizes[key] for key in ("embed_dim", "depth", "num_heads")] for sizes in (expected, config))
    if asked != there:
        raise errors.UserError(
            f"{source} does not hold {name}: its encoder has width {there[0]}, {there[1]} blocks and {there[2]} "
            f"attention heads, not {asked[0]}, {asked[1]} and {asked[2]}. Load it under the name of its own model"
        )


def _with_pretrained_cfg(model: nn.Module, checkpoint: dict) -> nn.Module:
    """Return the model, with pretrained_cfg as timm's models have it."""
    settings = configurations.evaluation_settings(files.checkpoint_args(checkpoint), model.config)
    model.pretrained_cfg = configurations.timm_pretrained_cfg(
        model.config, *settings, model.config.get("num_classes", 0)
    )
    return model


def _entry(load: collections.abc.Callable[..., nn.Module], name: str) -> collections.abc.Callable[..., nn.Module]:
    """Return the function that torch.hub finds for a model, with the help of the function that loads it."""
    entry = functools.partial(load, name)
    entry.__doc__ = load.__doc__
    return entry


globals().update({name: _entry(_autoencoder, name) for name in models_mae.MODELS})
globals().update({name: _entry(_classifier, name) for name in models_vit.MODELS})

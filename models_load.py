"""Build the model that a checkpoint holds, weights included.

checkpoint = load_checkpoint("checkpoint-399.pth")                     # util/checkpoint/files.py
model = models_load.autoencoder(checkpoint, "checkpoint-399.pth")      # models_mae.py
model = models_load.encoder(checkpoint, "checkpoint-399.pth")          # models_vit.py, without a head

The second argument is the checkpoint's name for messages.
"""

from collections.abc import Callable

from torch import Tensor, nn

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.checkpoint import comparison, weights
from util.checkpoint.configurations import ENCODER_ARGUMENTS
from util.checkpoint.files import checkpoint_args
from util.checkpoint.formats import add_class_position, count_blocks, has_decoder
from util.distributed import dist
from util.errors import UserError


def autoencoder(checkpoint: dict, source: str, norm_pix_loss: bool = False) -> MaskedAutoencoderViT:
    """Build the autoencoder that a checkpoint holds.

    Args:
        checkpoint: A loaded checkpoint of main_pretrain.py or of the reference, or a released file with decoder.
        source: Its file name, for error messages.
        norm_pix_loss: Whether the model predicts normalised patches, if the checkpoint itself does not say.

    Raises:
        UserError: The file holds no decoder, or weights that fit no masked autoencoder.
    """
    state = checkpoint["model"]
    if not has_decoder(state) or "mask_token" not in state:
        raise UserError(
            f"{source} has no decoder, so it cannot reconstruct images: use a checkpoint of main_pretrain.py, or a "
            "released file with decoder (mae_visualize_*.pth, or mae_pretrain_*_full.pth with --norm_pix_loss)"
        )

    # Only this code stores `model_config`. The reference's checkpoints hold flags (`args`), whose norm_pix_loss leaves
    # no trace in the weights; released files hold neither, and the weights' shapes have to do.
    config = checkpoint.get("model_config") or _autoencoder_from_shapes(state, source)
    if "model_config" not in checkpoint:
        comparison.warn_of_unknown_targets(source, checkpoint, norm_pix_loss)
        config["norm_pix_loss"] = bool(checkpoint_args(checkpoint).get("norm_pix_loss", norm_pix_loss))

    model = autoencoder_from_config(config)
    remedy = (
        "Use a checkpoint of main_pretrain.py or a released file with decoder, or what needs the encoder alone, such "
        "as main_export.py --to timm"
    )
    weights.load_exactly(model, state, source, "masked autoencoder", remedy)
    return model


def classifier(checkpoint: dict, source: str) -> VisionTransformer:
    """Build the classifier that a checkpoint holds; of a learning-rate sweep's heads the best is kept.

    Args:
        checkpoint: A loaded checkpoint of main_finetune.py or main_linprobe.py, or a released file with a head.
        source: Its file name, for error messages.

    Raises:
        UserError: The file holds no such model.
    """
    if not comparison.has_head(checkpoint["model"]):
        raise UserError(
            f"{source} has no head, so it cannot predict classes: train one first with main_finetune.py or "
            "main_linprobe.py"
        )
    comparison.refuse_other_pooling(source, checkpoint)
    state, config = weights_and_config(checkpoint, source)
    model = classifier_from_config(config)
    _load(model, state, source)
    return keep_best_head(model, checkpoint)


def encoder(checkpoint: dict, source: str) -> VisionTransformer:
    """Build the encoder that a checkpoint holds, without its decoder or head.

    Args:
        checkpoint: A loaded checkpoint of any of the jobs, a released file, or one of another program.
        source: Its file name, for error messages.

    Returns:
        The encoder. It returns the class token after `norm` if the file has that layer, else the mean of the patch
        tokens, normalised by `fc_norm`.

    Raises:
        UserError: The file holds no such model, or an encoder with more than the models here have.
    """
    state, config = weights_and_config(checkpoint, source)
    config = {name: config[name] for name in ENCODER_ARGUMENTS}
    model = classifier_from_config(config | {"num_classes": 0, "global_pool": "norm.weight" not in state})

    # Only a decoder, a head and an unneeded norm may stay unused in the file: refuse any other surplus weight.
    names = model.state_dict().keys()
    comparison.refuse_foreign_parts(source, set(state) - set(names) - weights.unneeded_norms(state))
    _load(model, {name: value for name, value in state.items() if name in names}, source)
    return model


def weights_and_config(checkpoint: dict, source: str) -> tuple[dict[str, Tensor], dict]:
    """Return a checkpoint's weights, and the arguments of the classifier or the autoencoder that they belong to.

    Raises:
        UserError: They are not those of a Vision Transformer.
    """
    state, config = checkpoint["model"], dict(checkpoint.get("model_config") or {})
    if not config:
        state = add_class_position(checkpoint, source)
        described = checkpoint.get("described") or {}
        known = {name: described[name] for name in ("img_size", "num_heads") if name in described}
        config = _encoder_from_shapes(state, source) | known
    if "cls_token" not in state:
        raise UserError(f"{source} does not fit: {comparison.NO_CLASS_TOKEN}")
    return state, config


def _load(model: VisionTransformer, state: dict[str, Tensor], source: str) -> None:
    remedy = "Use a checkpoint of main_pretrain.py, main_finetune.py or main_linprobe.py, or a released file"
    weights.load_exactly(model, state, source, "Vision Transformer", remedy)


def keep_best_head(model: VisionTransformer, checkpoint: dict) -> VisionTransformer:
    """Keep only the best head of a learning-rate sweep, in place; a model with one head stays as it is.

    Args:
        model: The classifier.
        checkpoint: Holds the accuracies of the last evaluation (in `position`; earlier versions had those of the last
            epoch only, in `stats`). Without an evaluation the first head is kept.

    Returns:
        The same model.
    """
    if model.config.get("probe_heads", 1) <= 1:
        return model
    stats = (checkpoint.get("position") or {}).get("tested") or checkpoint.get("stats") or {}
    flags = checkpoint_args(checkpoint)
    rates = flags.get("blr") or [0.0]
    names = [f"test_{flags.get('best_by', 'acc1')}_{models_vit.head_name(blr)}" for blr in rates]
    accuracies = [stats.get(name, -1.0) for name in names]
    best = accuracies.index(max(accuracies))
    evaluated = accuracies[best] >= 0
    reason = f"the best one, accuracy {accuracies[best]:.2f} %" if evaluated else "the first one: none was evaluated"
    dist.print_rank0(f"keeping the head of --blr {rates[best]:g} ({reason})")
    model.head[1] = model.head[1].heads[best]
    model.config["probe_heads"] = 1
    return model


# Models without weights, as checkpoints describe them.


def autoencoder_from_config(config: dict) -> MaskedAutoencoderViT:
    """Build the autoencoder that a checkpoint's `model_config` describes, with random weights.

    Raises:
        UserError: It has arguments that this version does not know.
    """
    return _build(MaskedAutoencoderViT, config)


def classifier_from_config(config: dict) -> VisionTransformer:
    """Build the classifier that a checkpoint's `model_config` describes, with random weights.

    Raises:
        UserError: It has arguments that this version does not know.
    """
    model = _build(VisionTransformer, config)
    if "probe" not in config:
        return model
    return models_vit.make_linear_probe(model, config.get("probe_heads", 1), config["probe"] == "attentive")


def _build(kind: Callable[..., nn.Module], config: dict) -> nn.Module:
    """Call a model's constructor with the arguments of a `model_config`, which also holds names that are none."""
    try:
        return kind(**{name: value for name, value in config.items() if name not in ("model", "probe", "probe_heads")})
    except TypeError as error:
        raise UserError(
            f"the checkpoint's model_config can't be built here: {error}. Use the version that has saved it"
        ) from error


def _autoencoder_from_shapes(state: dict[str, Tensor], source: str) -> dict:
    """Derive an autoencoder's constructor arguments, all but norm_pix_loss, from the shapes of its weights.

    The number of the decoder's attention heads leaves no trace in the shapes: it is taken from the model in models_mae
    with a decoder of this width and depth; if there is none, it is 16, as in the paper.

    Raises:
        UserError: The encoder is none of models_vit.py, or the decoder is none of Transformer blocks.
    """
    config, depth = _encoder_from_shapes(state, source), count_blocks(state, "decoder_blocks.")
    if "decoder_embed.weight" not in state or not depth:
        raise UserError(
            f"{source} holds no decoder of Transformer blocks (decoder_embed, decoder_blocks), so it cannot be built "
            "here: use a checkpoint of main_pretrain.py, or a released file with decoder"
        )
    decoder = {"decoder_embed_dim": state["decoder_embed.weight"].shape[0], "decoder_depth": depth}
    models = [known.keywords for known in models_mae.MODELS.values() if decoder.items() <= known.keywords.items()]
    decoder["decoder_num_heads"] = models[0]["decoder_num_heads"] if models else 16
    return {name: config[name] for name in ENCODER_ARGUMENTS} | decoder


def _encoder_from_shapes(state: dict[str, Tensor], source: str) -> dict:
    """Derive a classifier's constructor arguments from the shapes of its weights.

    The number of attention heads leaves no trace in the shapes: it is that of the model in SIZES with this width and
    depth. Images are taken to be square, and mlp_ratio to be 4.

    Args:
        state: Weights by name.
        source: Name of their file, for error messages.

    Returns:
        Arguments of `VisionTransformer`.

    Raises:
        UserError: The weights are not those of a Vision Transformer, or its width and depth are not in SIZES.
    """
    try:
        dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        depth = count_blocks(state)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source} holds no Vision Transformer: weights are missing or of another shape ({error}). Use a "
            "checkpoint of main_pretrain.py, main_finetune.py or main_linprobe.py, or a released file"
        ) from error

    for size in models_vit.SIZES.values():
        if (size["embed_dim"], size["depth"]) == (dim, depth):
            return {
                **size,
                "img_size": side * patch_size,
                "patch_size": patch_size,
                "in_chans": channels,
                "mlp_ratio": 4.0,
                "num_classes": comparison.count_classes(state),
                "global_pool": "fc_norm.weight" in state,
                **({"probe": "linear"} if "head.1.weight" in state else {}),
            }
    raise UserError(
        f"{source} holds no model_config, and no model of models_vit.py is {dim} wide and {depth} blocks deep: use a "
        "checkpoint that describes its model, or a file of one of those models"
    )

"""Checkpoints of other programs: wrapped weights, encoders of other architectures, what lies beside them."""

import argparse
import re

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

import main_export
import main_features
import models_load
import models_mae
import models_vit
from util.checkpoint import weights
from util.checkpoint.configurations import from_export_config
from util.checkpoint.files import load_checkpoint
from util.errors import UserError

SIZES = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 4, "img_size": 8}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def renamed(state, *patterns):
    """Return the weights with parts of their names replaced."""
    for pattern, replacement in patterns:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def other(state):
    """Return other weights of the same names."""
    return {name: value + 1 for name, value in state.items()}


MMPRETRAIN = (
    (r"^patch_embed\.proj", "patch_embed.projection"),
    (r"^norm\.", "ln1."),
    (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
    (r"^blocks\.", "layers."),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
)

WRAPPINGS = {
    "timm's training": lambda s: {"arch": "vit", "state_dict": s, "state_dict_ema": other(s), "optimizer": {}},
    "Lightning": lambda s: {"state_dict": prefixed("model.backbone.", s), "hyper_parameters": {"lr": 1.0}, "loops": {}},
    "DDP and compile": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "compile in DDP": lambda s: {"net": prefixed("_orig_mod.module.", s)},
    "compiled blocks": lambda s: {"model": renamed(s, (r"blocks\.(\d+)\.", r"blocks.\1._orig_mod."))},
    "FSDP": lambda s: {"model_state": renamed(s, (r"blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module."))},
    "DINO": lambda s: {"student": prefixed("module.backbone.", other(s)), "teacher": prefixed("backbone.", s)},
    "DINO in one": lambda s: {"state_dict": prefixed("student.backbone.", other(s)) | prefixed("teacher.backbone.", s)},
    "MoCo": lambda s: {
        "state_dict": prefixed("module.momentum_encoder.", other(s)) | prefixed("module.base_encoder.", s)
    },
    "DeepSpeed": lambda s: {"module": s, "ds_version": "0.14", "optimizer": None},
    "open_clip": lambda s: {"state_dict": prefixed("visual.trunk.", s) | {"logit_scale": torch.ones(())}},
    "bare with prefix": lambda s: prefixed("encoder.", s) | {"fc.weight": torch.ones(2)},
    "nested": lambda s: {"checkpoint": {"weights": {"net": prefixed("backbone.", s)}}, "epoch": 3},
    "mmpretrain": lambda s: {
        "meta": {},
        "state_dict": prefixed("backbone.", renamed(s, *MMPRETRAIN)) | {"head.fc.weight": torch.ones(2)},
    },
    "an average in capitals": lambda s: {"EMA": other(s), "weights": s},
    "an averaged model": lambda s: {"averaged_model": other(s), "online": s},
    "key and query": lambda s: prefixed("key_encoder.", other(s)) | prefixed("query_encoder.", s),
    "an average first": lambda s: {"ema": other(s), "weights": s},
    "an average by prefix": lambda s: {"state_dict": prefixed("ema_model.", other(s)) | prefixed("net.", s)},
    "only an average": lambda s: {"model_ema": s},
    "unfamiliar keys": lambda s: {"online": {"vit_body": prefixed("x.y.", s)}},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_weights_are_found_in_any_wrapping_and_it_is_said(kind, encoder, tmp_path, capsys):
    torch.save(WRAPPINGS[kind](encoder), tmp_path / "file.pth")
    checkpoint = load_checkpoint(str(tmp_path / "file.pth"))
    assert checkpoint["model"].keys() == encoder.keys()
    assert all(torch.equal(checkpoint["model"][name], value) for name, value in encoder.items())
    assert "notice: weights of" in capsys.readouterr().out
    fresh = models_vit.VisionTransformer(**SIZES, num_classes=2)
    missing, _ = weights.load_pretrained(str(tmp_path / "file.pth"), fresh)
    assert missing == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "module.momentum_encoder."])
def test_mocos_small_model_is_refused_for_its_number_of_heads(prefix, encoder, tmp_path):
    torch.save({"arch": "vit_small", "state_dict": prefixed(prefix, encoder)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="MoCo v3's ViT-S, which has 12 attention heads instead of the usual 6"):
        load_checkpoint(str(tmp_path / "file.pth"))
    torch.save({"arch": "vit_base", "state_dict": prefixed(prefix, encoder)}, tmp_path / "file.pth")
    load_checkpoint(str(tmp_path / "file.pth"))


def test_an_average_is_taken_only_where_it_is_asked_for(encoder, tmp_path):
    file = str(tmp_path / "timm.pth")
    torch.save(WRAPPINGS["timm's training"](encoder), file)
    assert torch.equal(load_checkpoint(file, ema=True)["model"]["cls_token"], encoder["cls_token"] + 1)
    torch.save(WRAPPINGS["DINO"](encoder), file)
    with pytest.raises(UserError, match="holds no EMA"):
        load_checkpoint(file, ema=True)


def test_a_hugging_face_encoder_in_a_training_programs_file(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=8, patch_size=4
    )
    theirs = transformers.ViTForImageClassification(config)
    torch.save({"state_dict": prefixed("model.", theirs.state_dict())}, tmp_path / "file.pth")
    fresh = models_vit.VisionTransformer(**SIZES, num_classes=2, global_pool=False)
    weights.load_pretrained(str(tmp_path / "file.pth"), fresh)
    assert torch.equal(fresh.cls_token, theirs.vit.embeddings.cls_token)


@pytest.mark.parametrize("labels", [2, 3])
def test_classes_of_a_hugging_face_model_need_no_names(labels, tmp_path):
    """Of two classes without names transformers stores nothing, since that is its default."""
    config = transformers.ViTConfig(
        **{"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
        **{"image_size": 8, "patch_size": 4, "num_labels": labels},
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = models_load.classifier(load_checkpoint(str(tmp_path)), str(tmp_path)).eval()
    imgs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert model(imgs).shape == (2, labels) and theirs(pixel_values=imgs).logits.shape == (2, labels)
        assert torch.equal(model.head.weight, theirs.classifier.weight)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"epoch": 3, "hyper": {"a": 1}}, "but epoch, hyper"),
        ({"state_dict": {"conv1.weight": torch.ones(2)}, "arch": "resnet"}, "but state_dict, arch"),
    ],
)
def test_a_file_without_a_vision_transformer_names_what_it_holds(content, named, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"no weights of a Vision Transformer, {named}"):
        load_checkpoint(str(tmp_path / "file.pth"))


# Other architectures.


def foreign(model, **more):
    """Return the weights of a timm ViT of the demo's size with a part that the models here lack."""
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("embed_dim", "depth", "num_heads", "patch_size", "img_size")}
    return timm.models.VisionTransformer(**sizes, num_classes=0, **(model | more)).state_dict()


def hugging_faces_dinov2():
    """Return the weights of Hugging Face's Dinov2 of the demo's size."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).state_dict()


FOREIGN = {
    "Hugging Face's Dinov2": (hugging_faces_dinov2, "LayerScale"),
    "LayerScale": (lambda: foreign({"init_values": 0.1}), "LayerScale .blocks.0.ls1.gamma"),
    "norms of queries": (lambda: foreign({"qk_norm": True}), "norms of queries and keys .blocks.0.attn.k_norm"),
    "registers": (lambda: foreign({"reg_tokens": 4, "no_embed_class": True}), "register tokens .reg_token"),
    "pre-norm": (lambda: foreign({"pre_norm": True}), "a norm before the blocks .norm_pre"),
    "gated MLP": (lambda: foreign({"mlp_layer": timm.layers.SwiGLU}), "gated MLPs|holds no Vision Transformer"),
    "distillation": (
        lambda: timm.models.deit.VisionTransformerDistilled(**SIZES, num_classes=0).state_dict(),
        "a distillation token",
    ),
    "BEiT": (
        lambda: timm.models.beit.Beit(**SIZES, num_classes=0, use_rel_pos_bias=True).state_dict(),
        "does not fit|holds no Vision Transformer",
    ),
    "no class token": (
        lambda: foreign({"class_token": False, "global_pool": "avg"}),
        "encoder has no class token, which",
    ),
    "extra block weight": (lambda: foreign({}) | {"blocks.0.adapter.weight": torch.ones(1)}, "blocks.0.adapter.weight"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("use", ["finetune", "init", "features", "export"])
def test_an_encoder_with_more_than_the_models_here_is_refused_by_name(kind, use, tmp_path):
    make, named = FOREIGN[kind]
    file = str(tmp_path / "foreign.pth")
    torch.save(make(), file)
    with pytest.raises(UserError, match=named):
        if use == "finetune":
            weights.load_pretrained(file, models_vit.VisionTransformer(**SIZES, num_classes=2))
        elif use == "init":
            weights.load_initial(file, models_mae.mae_vit_demo_patch4(img_size=8), {})
        elif use == "features":
            (tmp_path / "a.png").write_bytes(b"")
            main_features.main(
                ["--resume", file, "--data_path", str(tmp_path), "--output", str(tmp_path / "x.npz"), "--device", "cpu"]
            )
        else:
            main_export.main(["--resume", file, "--to", "encoder", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "x.npz").exists() and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("to", ["encoder", "timm", "onnx"])
def test_an_encoder_is_exported_whatever_decoder_is_beside_it(to, tmp_path, refusal):
    """CrossMAE's decoder has attention of another kind; Hugging Face's format is the only one that needs a decoder."""
    model = models_mae.mae_vit_demo_patch4(img_size=8)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder_blocks.")}
    torch.save({"model": state | {"decoder_blocks.0.cross_attn.q.weight": torch.ones(2, 2)}}, tmp_path / "cross.pth")
    argv = ["--resume", str(tmp_path / "cross.pth"), "--output", str(tmp_path / "out"), "--to"]
    main_export.main([*argv, to])
    if to != "onnx":
        exported = load_checkpoint(str(tmp_path / "out"))["model"]
        assert torch.equal(exported["blocks.5.mlp.fc2.weight"], state["blocks.5.mlp.fc2.weight"])
        assert not [name for name in exported if name.startswith("decoder")]
    said = refusal(lambda: main_export.main([*argv, "hf"]))
    assert "no masked autoencoder that can be built here" in said and "main_export.py --to timm" in said


@pytest.mark.parametrize(
    "extra",
    ["decoder.0.weight", "head.mlp.0.weight", "projector.0.weight", "prototypes.weight", "mask_token", "fc.bias"],
)
def test_heads_and_decoders_of_other_methods_are_left_in_the_file(extra, encoder, tmp_path, capsys):
    file = str(tmp_path / "file.pth")
    torch.save(encoder | {extra: torch.ones(1)}, file)
    trunk = models_load.encoder(load_checkpoint(file), file)
    assert torch.equal(trunk.blocks[5].mlp.fc2.weight, encoder["blocks.5.mlp.fc2.weight"])
    weights.load_pretrained(file, models_vit.VisionTransformer(**SIZES, num_classes=2))
    assert extra.split(".")[0] in capsys.readouterr().out.split("not used:")[1]


def test_positions_without_a_row_for_the_class_token_compute_the_same_as_in_timm(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("embed_dim", "depth", "num_heads", "patch_size", "img_size")}
    theirs = timm.models.VisionTransformer(**sizes, num_classes=0, no_embed_class=True, norm_layer=None).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    file = str(tmp_path / "file.pth")
    torch.save(theirs.state_dict(), file)
    trunk = models_load.encoder(load_checkpoint(file), file).eval()
    imgs = torch.randn(2, 3, 8, 8)
    assert torch.allclose(trunk.forward_features(imgs), theirs.forward_features(imgs), atol=1e-5)
    assert "has no position of its own" in capsys.readouterr().out


@pytest.mark.parametrize("side", [8, 28])
def test_rows_of_a_grid_that_the_file_describes_are_not_guessed(side, tmp_path, capsys):
    """6 x 8 patches and the class token have as many rows as 7 x 7 patches without it."""
    sizes = {**SIZES, "num_classes": 0, "global_pool": False}
    source = models_vit.VisionTransformer(**sizes | {"img_size": (24, 32)})
    torch.nn.init.normal_(source.pos_embed)
    file = str(tmp_path / "file.pth")
    torch.save({"model": source.state_dict(), "model_config": source.config}, file)
    model = models_vit.VisionTransformer(**sizes | {"img_size": side})
    weights.load_pretrained(file, model)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert "has no position of its own" not in (said := capsys.readouterr().out)
    assert f"positions resized from 6 x 8 to {side // 4} x {side // 4}" in said


def test_a_square_grid_with_a_class_token_is_not_taken_for_the_models_patches(tmp_path, capsys):
    """7 x 7 patches and the class token have as many rows as the model has patches, 5 x 10."""
    sizes = {**SIZES, "num_classes": 0, "global_pool": False}
    source = models_vit.VisionTransformer(**sizes | {"img_size": 28})
    torch.nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    model = models_vit.VisionTransformer(**sizes | {"img_size": (20, 40)})
    weights.load_pretrained(str(tmp_path / "file.pth"), model)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert "positions resized from 7 x 7 to 5 x 10" in capsys.readouterr().out


def test_a_probe_without_model_config_is_built_from_its_shapes(tmp_path):
    """Such are the reference's: BatchNorm and a linear layer as head, and flags as a Namespace."""
    probe = models_vit.make_linear_probe(
        models_vit.vit_demo_patch4(img_size=8, num_classes=3, global_pool=False)
    ).eval()
    torch.nn.init.normal_(probe.head[1].weight)
    file = str(tmp_path / "file.pth")
    torch.save({"model": probe.state_dict(), "args": argparse.Namespace(blr=0.1), "epoch": 1}, file)
    imgs = torch.randn(2, 3, 8, 8)
    assert torch.equal(models_load.classifier(load_checkpoint(file), file).eval()(imgs), probe(imgs))


def test_a_model_config_of_a_later_version_is_a_message(tmp_path):
    model = models_vit.vit_demo_patch4(img_size=8, num_classes=3)
    checkpoint = {"model": model.state_dict(), "model_config": {**model.config, "later": 1}, "job": "finetune"}
    with pytest.raises(UserError, match="'later'. Use the version that has saved it"):
        models_load.classifier(checkpoint, "file.pth")


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 8},
        {"img_size": (8, 16)},
        {"global_pool": "avg"},
        {},
        *({"global_pool": pool} for pool in ("max", "avgmax")),
        {"global_pool": "avg", "fc_norm": False},
    ],
    ids=str,
)
def test_a_folder_that_timm_saved_is_timms_model_or_is_refused(arguments, tmp_path):
    """timm's config.json states only the arguments that the user names."""
    arguments = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 3,
    } | arguments
    theirs = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    for value in (theirs.head.weight, theirs.pos_embed):
        torch.nn.init.normal_(value)
    names = {"label_names": ["zebra", "cat", "ant"]}
    timm.models.save_for_hf(theirs, tmp_path, model_config=names, model_args=arguments)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint["class_to_idx"] == {"zebra": 0, "cat": 1, "ant": 2}
    if arguments.get("fc_norm") is False or arguments.get("global_pool") in ("max", "avgmax"):
        with pytest.raises(
            UserError, match="it classifies by the pooling '(max|avgmax|avg)', .* pools by '(avg|token)' here"
        ):
            models_load.classifier(checkpoint, "folder")
        assert models_load.encoder(checkpoint, "folder").config["num_heads"] == 4
        return
    model, imgs = (
        models_load.classifier(checkpoint, "folder").eval(),
        torch.randn(2, 3, *theirs.patch_embed.img_size),
    )
    assert torch.allclose(model(imgs), theirs(imgs), atol=1e-4)


def test_a_folders_config_counts_for_weights_with_a_prefix_too(tmp_path):
    """As transformers saves a model of the user's that holds a ViTModel."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 512}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    config.save_pretrained(tmp_path)
    save_file({f"backbone.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    encoder = models_load.encoder(load_checkpoint(str(tmp_path)), str(tmp_path))
    assert encoder.config["num_heads"] == 8 and encoder.config["img_size"] == 8


def test_moco_v3s_small_model_is_refused_after_probing_too(tmp_path):
    model = models_vit.VisionTransformer(**SIZES, num_classes=2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="seems to be MoCo v3's ViT-S"):
        load_checkpoint(str(tmp_path / "file.pth"))


def test_two_rows_before_the_patches_are_named(encoder, tmp_path):
    positions = encoder["pos_embed"]
    torch.save(encoder | {"pos_embed": torch.cat([positions[:, :1], positions], dim=1)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="rows of positions: 6 in the file, 5 here"):
        weights.load_pretrained(str(tmp_path / "file.pth"), models_vit.VisionTransformer(**SIZES, num_classes=2))


# What lies beside the weights, and what they are made of.


@pytest.mark.parametrize(
    "entry",
    [
        {"model_config": {"name": "vit"}},
        {"model_config": "vit_base"},
        {"class_to_idx": ["a", "b"]},
        {"stats": [1, 2], "saved": "2024-01-01"},
        {"args": {"mean": 0.5, "std": "0.5,0.5,0.5", "crop_pct": "0.9"}},
        {"args": {"mean": [123.675, 116.28, 103.53], "std": [58.4, 57.1, 57.4]}},
        {"args": {"mean": torch.tensor([0.5, 0.5, 0.5]), "blr": None}, "epoch": "0", "optimizer": {}},
        {"args": {"blr": 1.0, "batch_size": "16"}, "epoch": None, "optimizer": {}, "rng": torch.zeros(3)},
        {"position": [1], "job": "train vit", 7: "seven"},
        {"args": {"blr": 1e-3, "mean": 0.5, "std": 0.5, "crop_pct": "0.9"}},
        {"args": {"blr": 1e-3, "mean": [123.675, 116.28, 103.53], "std": [58.4, 57.1, 57.4]}},
        {"args": {"mean": [0.5, 0.5, 0.5]}},
        {"args": {"mean": [0.5], "std": [0.5]}},
        {"model_config": {**SIZES, "mlp_ratio": 4.0, "qkv_bias": True}},
        {"model_config": {**SIZES, "mlp_ratio": 4.0, "patch_size": (4, 4)}},
        {"model_config": {**SIZES, "mlp_ratio": 4.0, "global_pool": "token"}},
    ],
    ids=lambda entry: " ".join(map(str, entry)),
)
def test_entries_of_another_meaning_do_not_count(entry, encoder, images, tmp_path):
    """Features are those of the weights with the usual pixels; a run starts, an export is written."""
    plain, odd = str(tmp_path / "plain.pth"), str(tmp_path / "odd.pth")
    torch.save({"model": encoder}, plain)
    torch.save({"model": encoder, **entry}, odd)
    for file in (plain, odd):
        argv = ["--resume", file, "--data_path", str(images / "val" / "bag"), "--output", file + ".npz"]
        main_features.main([*argv, "--device", "cpu"])
    assert np.array_equal(np.load(plain + ".npz")["features"], np.load(odd + ".npz")["features"])
    weights.load_pretrained(odd, models_vit.VisionTransformer(**SIZES, num_classes=2), {"mean": [0.5] * 3})
    main_export.main(["--resume", odd, "--to", "timm", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.to_sparse(),
        lambda value: (100 * value).to(torch.int8),
        lambda value: value.to("meta"),
        lambda value: value > 0,
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(change, encoder, tmp_path):
    file = str(tmp_path / "file.pth")
    torch.save(encoder | {"blocks.1.mlp.fc1.weight": change(encoder["blocks.1.mlp.fc1.weight"])}, file)
    with pytest.raises(UserError, match="blocks.1.mlp.fc1.weight is of type|is not a whole PyTorch checkpoint"):
        weights.load_pretrained(file, models_vit.VisionTransformer(**SIZES, num_classes=2))
    with pytest.raises(UserError, match="blocks.1.mlp.fc1.weight is of type|is not a whole PyTorch checkpoint"):
        models_load.encoder(load_checkpoint(file), file)


@pytest.mark.parametrize("grid", [(24, 32), (32, 40), (12, 32)])
def test_positions_of_a_grid_that_is_not_square_are_left_alone(grid, tmp_path):
    """Though with the class token's their number may be that of a square."""
    sizes = SIZES | {"img_size": grid}
    torch.manual_seed(0)
    theirs = models_vit.VisionTransformer(**sizes, num_classes=0, global_pool=False).state_dict()
    torch.nn.init.normal_(theirs["pos_embed"])
    file = str(tmp_path / "file.pth")
    torch.save({"model": theirs}, file)
    fresh = models_vit.VisionTransformer(**sizes, num_classes=2)
    weights.load_pretrained(file, fresh)
    assert torch.equal(fresh.pos_embed, theirs["pos_embed"])
    full = models_mae.mae_vit_demo_patch4(img_size=grid)
    torch.save({"model": full.state_dict()}, file)
    start = models_mae.mae_vit_demo_patch4(img_size=grid)
    weights.load_initial(file, start, {})
    assert torch.equal(start.pos_embed, full.pos_embed)


@pytest.mark.parametrize("activation", ["quick_gelu", "relu"])
def test_another_activation_is_refused(activation, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, image_size=8, patch_size=4, hidden_act=activation
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"its activation is {activation}"):
        load_checkpoint(str(tmp_path))


def test_classes_of_the_same_name_are_told_apart():
    config = dict.fromkeys(("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio"), 1)
    stored = from_export_config({**config, "label_names": ["a", "crane", "b", "crane"]})
    assert stored["class_to_idx"] == {"a": 0, "crane (1)": 1, "b": 2, "crane (3)": 3}


@pytest.mark.parametrize("cut", [25, 30, 55, 300])
def test_old_format_files_that_are_cut_off_say_so(cut, encoder, tmp_path):
    torch.save({"model": encoder}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "file.pth").write_bytes((tmp_path / "file.pth").read_bytes()[:cut])
    with pytest.raises(UserError, match="file.pth is not a"):
        load_checkpoint(str(tmp_path / "file.pth"))

"""Formats: models exported to timm, Hugging Face and ONNX compute the same there, and can be loaded back."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from conftest import SAMPLES
from PIL import Image
from safetensors.torch import load_file, save_file

import main_export
import main_finetune
import main_predict
import main_pretrain
import main_reconstruct
import models_load
import models_mae
import models_vit
from util import optim
from util.amp import LossScaler
from util.checkpoint import weights
from util.checkpoint.configurations import from_hugging_face_config, is_model_config, preprocessing
from util.checkpoint.files import checkpoint_args, load_checkpoint
from util.checkpoint.formats import recognise, to_hugging_face
from util.data.images import PixelSpec
from util.data.transforms import CentreCrop
from util.errors import UserError
from util.misc import Checkpoints, Position

CPU = torch.device("cpu")
SIZES = ["small", pytest.param("base", marks=pytest.mark.slow)]
BASE_ENCODER = pytest.param("encoder", "base", marks=pytest.mark.slow)
CLASSES = {"cat": 0, "dog": 1, "eel": 2}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
SMALL_MAE = {**SMALL, "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4, "norm_pix_loss": True}


def randomise(model):
    """Move all weights, those of LayerNorms too, away from their initial values, so that mistakes show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def autoencoder(size):
    return randomise(
        models_mae.MaskedAutoencoderViT(**SMALL_MAE)
        if size == "small"
        else models_mae.MODELS["mae_vit_base_patch16"](norm_pix_loss=True)
    )


def classifier(size, **more):
    build = models_vit.MODELS["vit_base_patch16"] if size == "base" else models_vit.VisionTransformer
    return randomise(build(**(SMALL if size == "small" else {}), num_classes=3, **more))


def save_checkpoint(folder, model, job, **flags):
    """Save a checkpoint as a run would, and return its path."""
    ours = isinstance(model, models_mae.MaskedAutoencoderViT)
    name = "mae_vit_base_patch16" if ours else "vit_base_patch16"
    args = {
        "model": name,
        "keep": None,
        "mask_ratio": 0.75,
        "data_path": "/somewhere/pets",
        "batch_size": 8,
        "accum_iter": 2,
        "epochs": 3,
        **flags,
    }
    keeper = Checkpoints(
        str(folder),
        job,
        model,
        optim.pretrain_optimizer(model, 1e-3, 0.05),
        LossScaler("off", CPU),
        args,
        None if ours else CLASSES,
    )
    keeper.folder.mkdir(parents=True, exist_ok=True)
    keeper.save(Position(2, stats={"train_loss": 0.5, "test_acc1": 81.25}), whole_epoch=True)
    return str(folder / "checkpoint-2.pth")


def export(source, to, folder, *more):
    main_export.main(["--resume", source, "--to", to, "--output", str(folder), *more])
    return folder


def random_images(model, count=2):
    return torch.randn(count, model.config["in_chans"], *model.patch_embed.img_size)


def assert_same_weights(state, other):
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("size", SIZES)
def test_an_autoencoder_becomes_hugging_faces_and_comes_back(size, tmp_path):
    """The same noise gives the same mask, loss and predictions; tensor names are those of Hugging Face's files."""
    model = autoencoder(size)
    folder = export(save_checkpoint(tmp_path / "run", model, "pretrain"), "hf", tmp_path / "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    imgs = random_images(model)
    noise = torch.rand(2, model.patch_embed.num_patches)
    with torch.no_grad():
        loss, pred, mask = model(imgs, 0.75, noise)
        found = theirs(pixel_values=imgs, noise=noise)
    assert torch.equal(mask, found.mask)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, pred, rtol=1e-5, atol=1e-4 if size == "base" else 1e-5)
    names = set(load_file(folder / "model.safetensors"))
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert "decoder.decoder_layers.0.intermediate.dense.bias" in names
    back = load_checkpoint(str(folder))
    assert back["format"] == "Hugging Face's ViTMAE" and not back["left_out"]
    assert_same_weights(models_load.autoencoder(back, str(folder)).state_dict(), model.state_dict())


@pytest.mark.parametrize("generation", ["released", "in memory", "as saved"])
def test_every_generation_of_hugging_faces_names_is_read(generation, tmp_path):
    model = autoencoder("small")
    released = to_hugging_face(model.state_dict())
    folder = export(save_checkpoint(tmp_path / "run", model, "pretrain"), "hf", tmp_path / "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    state = {
        "released": released,
        "in memory": theirs.state_dict(),
        "as saved": load_file(tmp_path / "saved" / "model.safetensors"),
    }[generation]
    assert_same_weights(recognise(state).state, model.state_dict())
    # without the prefix, as transformers saves an encoder alone
    bare = {name.removeprefix("vit."): value for name, value in state.items() if not name.startswith("decoder")}
    found = recognise(bare | {"pooler.dense.weight": torch.zeros(1)})
    assert found.left_out == ["pooler.dense.weight"] and found.kind == "Hugging Face's ViT"
    assert all(torch.equal(found.state[name], model.state_dict()[name]) for name in found.state)
    assert len(found.state) == sum(not name.startswith(("decoder", "mask_token")) for name in model.state_dict())


@pytest.mark.parametrize("probe", [False, True])
def test_a_classifier_on_the_class_token_becomes_hugging_faces_and_comes_back(probe, tmp_path):
    model = classifier("small", global_pool=False)
    if probe:
        models_vit.make_linear_probe(model)
        model.train()(random_images(model, 16) * 3 + 1)  # BatchNorm statistics far from their initial values
        model.eval()
    source = save_checkpoint(tmp_path / "run", model, "linprobe" if probe else "finetune")
    folder = export(source, "hf", tmp_path / "hf")
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    imgs = random_images(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=imgs).logits, model(imgs), rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "eel"} and theirs.config.layer_norm_eps == 1e-6
    if not probe:
        back = load_checkpoint(str(folder))
        assert back["class_to_idx"] == CLASSES
        assert_same_weights(models_load.classifier(back, str(folder)).state_dict(), model.state_dict())


def test_an_encoder_alone_becomes_hugging_faces_and_comes_back(tmp_path):
    """Its tokens agree with ViTModel's, and ViTForImageClassification takes it to train a head."""
    model = autoencoder("small")
    encoder = str(export(save_checkpoint(tmp_path / "run", model, "pretrain"), "encoder", tmp_path / "encoder"))
    folder = export(encoder, "hf", tmp_path / "hf")
    assert 'ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)' in (folder / "README.md").read_text()
    theirs, info = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"]) and theirs.config.architectures == ["ViTModel"]
    imgs = random_images(model)
    in_order = torch.arange(model.patch_embed.num_patches).expand(2, -1).float()  # noise that moves no patch
    with torch.no_grad():
        tokens = theirs.eval()(pixel_values=imgs).last_hidden_state
        torch.testing.assert_close(tokens, model.forward_encoder(imgs, 0, in_order)[0], rtol=1e-5, atol=1e-5)
    _, info = transformers.ViTForImageClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert_same_weights(load_checkpoint(str(folder))["model"], load_checkpoint(encoder)["model"])


def test_an_encoder_that_pools_is_no_model_of_hugging_faces(tmp_path):
    source = save_checkpoint(tmp_path / "run", classifier("small", global_pool=True), "finetune")
    encoder = str(export(source, "encoder", tmp_path / "encoder"))
    with pytest.raises(UserError, match=r"has no final LayerNorm \(norm\), which Hugging Face's ViT always has"):
        export(encoder, "hf", tmp_path / "hf")


@pytest.mark.parametrize(("side", "flags"), [(32, {}), (32, {"crop_pct": 1.0}), (384, {})])
def test_hugging_faces_image_processor_sees_what_evaluation_sees(side, flags, tmp_path):
    """The pixels agree within the differences between two implementations of the bicubic filter."""
    model = models_mae.MaskedAutoencoderViT(**{**SMALL_MAE, "img_size": side, "patch_size": side // 4})
    folder = export(save_checkpoint(tmp_path / "run", model, "pretrain", **flags), "hf", tmp_path / "hf")
    file = next((SAMPLES.parent.parent / "tests" / "photos").glob("*.jpg"))
    picture = Image.open(file).convert("RGB")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    ours = CentreCrop(side, flags.get("crop_pct"))(np.array(picture)) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (PixelSpec().mean, PixelSpec().std))
    assert theirs.shape == ours.shape and ((ours - mean) / std - theirs).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, "small") for kind in ("encoder", "pooled", "token", "probe")] + [BASE_ENCODER]
)
def test_models_become_timms_and_come_back(size, kind, tmp_path):
    if kind == "encoder":
        model = autoencoder(size)
        source = save_checkpoint(tmp_path / "run", model, "pretrain")
    else:
        model = classifier(size, global_pool=kind == "pooled")
        if kind == "probe":
            models_vit.make_linear_probe(model, heads=2)
            model.train()(random_images(model, 4) * 3 + 1)
            model.eval()
        source = save_checkpoint(tmp_path / "run", model, "linprobe" if kind == "probe" else "finetune")
    folder = export(source, "timm", tmp_path / "timm")
    usage = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("model = timm."))
    # The command in the model card builds the model.
    theirs = eval(usage.replace("FOLDER", str(folder)).split(" = ", 1)[1], {"timm": timm}).eval()
    imgs = random_images(model)
    with torch.no_grad():
        if kind == "encoder":
            trunk = models_load.encoder(load_checkpoint(source), source).eval()
            ours = trunk.forward_features(imgs)
            all_kept = torch.arange(model.patch_embed.num_patches).expand(2, -1).float()
            torch.testing.assert_close(
                theirs.forward_features(imgs),
                model.forward_encoder(imgs, 0.0, all_kept)[0],
                rtol=1e-5,
                atol=1e-5 if size == "small" else 1e-4,
            )
            torch.testing.assert_close(theirs.forward_features(imgs), ours, rtol=1e-5, atol=1e-5)
        else:
            logits = model(imgs)[:, 0] if kind == "probe" else model(imgs)
            torch.testing.assert_close(theirs(imgs), logits, rtol=1e-5, atol=1e-5 if size == "small" else 1e-4)
    if kind != "probe":
        back = load_checkpoint(str(folder))["model"]
        own = trunk.state_dict() if kind == "encoder" else model.state_dict()
        assert_same_weights(back, own)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    fresh = classifier(size, global_pool=kind == "pooled")
    weights.load_pretrained(str(tmp_path / "timm.safetensors"), fresh)
    assert torch.equal(fresh.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("encoder", "small"),
        ("attentive", "small"),
        pytest.param("pooled", "small", marks=pytest.mark.slow),
        BASE_ENCODER,
    ],
)
def test_models_become_onnx(size, kind, tmp_path):
    """The exported model takes any number of images."""
    if kind == "encoder":
        model = autoencoder(size)
        source = save_checkpoint(tmp_path / "run", model, "pretrain")
    else:
        model = classifier(size, global_pool=kind == "pooled")
        if kind == "attentive":
            models_vit.make_linear_probe(model, attentive=True).eval()
        source = save_checkpoint(tmp_path / "run", model, "linprobe" if kind == "attentive" else "finetune")
    folder = export(source, "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count in (1, 3):
        imgs = random_images(model, count)
        (found,) = session.run(None, {"images": imgs.numpy()})
        with torch.no_grad():
            if kind == "encoder":
                trunk = models_load.encoder(load_checkpoint(source), source).eval()
                expected = trunk.forward_features(imgs)
            else:
                expected = model(imgs)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    stated = json.loads((folder / "config.json").read_text())
    assert stated["pretrained_cfg"]["mean"] and stated["pretrained_cfg"]["crop_pct"]
    assert len(stated.get("label_names", [])) == (0 if kind == "encoder" else model.config["num_classes"])


def test_the_encoder_alone_goes_out_and_starts_finetuning(tmp_path, capsys):
    model = autoencoder("small")
    folder = export(save_checkpoint(tmp_path / "run", model, "pretrain"), "encoder", tmp_path / "encoder")
    state = load_file(folder / "encoder.safetensors")
    assert not any(name.startswith(("decoder", "mask_token", "head")) for name in state)
    fresh = classifier("small", global_pool=True)
    weights.load_pretrained(str(folder / "encoder.safetensors"), fresh)
    assert torch.equal(fresh.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
    assert "new here: fc_norm.*, head.*; in the file but not used: norm.*" in capsys.readouterr().out


def test_an_encoder_that_goes_out_keeps_its_shape_and_pixels(tmp_path, capsys):
    """The shapes alone do not tell a grid of 2 x 8 from one of 4 x 4, nor the mean and std from ImageNet's."""
    model = randomise(models_mae.MaskedAutoencoderViT(**{**SMALL_MAE, "img_size": (16, 64)}))
    source = save_checkpoint(tmp_path / "run", model, "pretrain", mean=[0.3] * 3, std=[0.2] * 3, crop_pct=1.0)
    ours = models_load.encoder(load_checkpoint(source), source).eval()
    for to in ("encoder", "timm"):
        folder = export(source, to, tmp_path / to)
        back = load_checkpoint(str(folder))
        trunk = models_load.encoder(back, str(folder)).eval()
        imgs = random_images(model)
        assert torch.equal(trunk.forward_features(imgs), ours.forward_features(imgs))
        assert PixelSpec.from_args(back["args"], 3).mean == (0.3,) * 3
        fresh = classifier("small", global_pool=True)
        weights.load_pretrained(str(folder), fresh, {"mean": [0.485, 0.456, 0.406]})
        said = capsys.readouterr().out
        assert "positions resized from 2 x 8 to 4 x 4" in said and "was made with --mean [0.3, 0.3, 0.3], here" in said


@pytest.mark.parametrize(("to", "crop_pct"), [("hf", 1.0), ("hf", 0.85), ("timm", 0.85)])
def test_a_classifier_that_comes_back_takes_pixels_as_before(to, crop_pct, images, tmp_path):
    model = randomise(models_vit.VisionTransformer(**SMALL, num_classes=3, global_pool=False))
    source = save_checkpoint(tmp_path / "run", model, "finetune", mean=[0.3] * 3, std=[0.2] * 3, crop_pct=crop_pct)
    tables = []
    for resume in (source, str(export(source, to, tmp_path / to))):
        main_predict.main(["--resume", resume, "--images", str(images / "val"), "--output", str(tmp_path / "p.csv")])
        tables.append((tmp_path / "p.csv").read_text())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 224, "width": 224}}, 1.0),  # google/vit-base-patch16-224: the whole image is resized
        ({"size": 224}, 1.0),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False}, 1.0),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224 / 256.5),
    ],
)
def test_the_crop_is_that_of_hugging_faces_image_processor(processor, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(processor | {"image_mean": [0.5], "image_std": [0.5]})
    )
    assert preprocessing(tmp_path, {"model_type": "vit"}) == {"mean": [0.5], "std": [0.5], "crop_pct": expected}


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5] * 3, [0.25] * 3),  # transformers takes one number, too
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "do_normalize": False}, [0.0] * 3, [1.0] * 3),
    ],
)
def test_the_pixels_are_those_of_hugging_faces_image_processor(processor, mean, std, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = PixelSpec.from_args(preprocessing(tmp_path, {"model_type": "vit"}), 3)
    assert (list(found.mean), list(found.std)) == (mean, std)


def test_arguments_of_another_programs_model_are_no_config_of_ours():
    """They would be refused by the constructors, as tracebacks."""
    own = models_vit.vit_demo_patch4(num_classes=3).config
    assert is_model_config(own) and is_model_config({**own, "model": "vit_demo_patch4", "img_size": (28, 56)})
    for foreign in ({"qkv_bias": True}, {"patch_size": (4, 4)}, {"global_pool": "token"}, {"depth": "6"}):
        assert not is_model_config({**own, **foreign})


def test_a_short_config_stands_for_transformers_defaults():
    config = from_hugging_face_config({"decoder_hidden_size": 512})["model_config"]
    expected = transformers.ViTMAEConfig()
    assert config["decoder_depth"] == expected.decoder_num_hidden_layers
    assert config["decoder_num_heads"] == expected.decoder_num_attention_heads
    assert config["norm_pix_loss"] == expected.norm_pix_loss


def test_a_bin_file_alone_is_described_by_its_folder(tmp_path):
    source = save_checkpoint(tmp_path / "run", autoencoder("small"), "pretrain", mean=[0.5] * 3, std=[0.25] * 3)
    folder = export(source, "hf", tmp_path / "out")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = load_checkpoint(str(folder))
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = load_checkpoint(str(folder / name))
        assert found["args"] == expected["args"] and found["model_config"] == expected["model_config"]


def test_an_export_takes_the_place_of_another_in_the_same_folder(tmp_path):
    first = save_checkpoint(
        tmp_path / "a", classifier("small", global_pool=False), "finetune", mean=[0.1] * 3, std=[0.2] * 3
    )
    second = save_checkpoint(tmp_path / "b", autoencoder("small"), "pretrain", mean=[0.9] * 3, std=[0.2] * 3)
    for to in ("timm", "encoder"):
        export(first, "hf", tmp_path / "out")
        back = load_checkpoint(str(export(second, to, tmp_path / "out")))
        assert PixelSpec.from_args(back["args"], 3).mean == (0.9,) * 3 and "head.weight" not in back["model"]


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_an_export_does_not_remove_what_it_was_made_of(source, tmp_path, refusal):
    folder = export(save_checkpoint(tmp_path / "run", autoencoder("small"), "pretrain"), "hf", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    argv = ["--resume", str(folder / source), "--to", "encoder", "--output", str(folder)]
    said = refusal(lambda: main_export.main(argv))
    assert f"--output {folder} would replace --resume {folder / source} itself: choose another folder" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_an_export_does_not_replace_what_is_not_an_export(name, tmp_path, refusal):
    source = save_checkpoint(tmp_path / "run", autoencoder("small"), "pretrain")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of another program")
    argv = ["--resume", str(source), "--to", "encoder", "--output", str(tmp_path / "out")]
    assert f"holds {name}, which is not of an earlier export" in refusal(lambda: main_export.main(argv))
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["of another program"]


def test_weights_do_not_take_the_config_of_others_for_their_own(tmp_path):
    folder = export(save_checkpoint(tmp_path / "run", autoencoder("small"), "pretrain"), "encoder", tmp_path / "out")
    save_file(autoencoder("small").state_dict(), folder / "mine.safetensors")
    assert "model_config" not in load_checkpoint(str(folder / "mine.safetensors"))


@pytest.mark.parametrize("to", ["timm", "hf", "encoder"])
def test_exports_remember_that_images_were_rotated(to, tmp_path):
    model = classifier("small", global_pool=False)
    file = save_checkpoint(tmp_path / "run", model, "finetune")
    for exif in (False, True):
        stored = torch.load(file, weights_only=True)
        stored["args"]["exif"] = exif
        torch.save(stored, tmp_path / "rotated.pth")
        folder = export(str(tmp_path / "rotated.pth"), to, tmp_path / f"out{exif}")
        assert checkpoint_args(load_checkpoint(str(folder))).get("exif", False) is exif


def test_the_model_card_says_what_the_checkpoint_knows(tmp_path):
    model = classifier("small", global_pool=True)
    folder = export(
        save_checkpoint(tmp_path / "run", model, "finetune"), "timm", tmp_path / "timm", "--license", "cc-by-4.0"
    )
    text = (folder / "README.md").read_text()
    for line in (
        "data | pets",
        "epochs | 3",
        "mask ratio | 0.75",
        "classes | 3",
        "train_loss | 0.5",
        "test_acc1 | 81.25",
        "effective batch | 16",
    ):
        assert f"| {line} |" in text
    assert "license: cc-by-4.0" in text and "timm.create_model" in text and "| | |" in text
    assert "/somewhere" not in text


@pytest.mark.parametrize(
    ("model", "to", "message"),
    [
        (
            lambda: models_mae.MaskedAutoencoderViT(**{**SMALL_MAE, "img_size": (32, 48)}),
            "hf",
            "for 32 x 48 pixels; Hugging Face's ViTMAE and ViT are for squares",
        ),
        (lambda: classifier("small", global_pool=True), "hf", "pools the patches, and Hugging Face's ViT classifies"),
        (lambda: models_vit.make_linear_probe(classifier("small"), attentive=True), "timm", "only --to onnx can take"),
    ],
)
def test_what_the_other_library_cannot_run_is_said(model, to, message, tmp_path):
    model = model()
    job = "pretrain" if isinstance(model, models_mae.MaskedAutoencoderViT) else "finetune"
    with pytest.raises(UserError, match=message):
        export(save_checkpoint(tmp_path / "run", model, job), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"patch_size": 16}, r"patch size: 16 in the file, 8 here \(--patch_size\)"),
        ({"patch_size": 16, "img_size": 64}, r"image size: 64 in the file, 32 here \(--input_size\)"),
        ({"in_chans": 5}, r"channels: 5 in the file, 3 here \(--in_chans\)"),
        ({"embed_dim": 64}, r"encoder width: 64 in the file, 48 here \(--model\)"),
        ({"depth": 2}, r"encoder blocks: 2 in the file, 3 here \(--model\)"),
        ({"num_heads": 2}, r"attention heads: 2 in the file, 4 here \(--model small\)"),
    ],
)
def test_an_encoder_that_does_not_fit_is_told_with_both_sides(theirs, message, tmp_path):
    other = models_mae.MaskedAutoencoderViT(**{**SMALL_MAE, **theirs})
    source = save_checkpoint(tmp_path / "run", other, "pretrain")
    with pytest.raises(UserError, match=message):
        weights.load_pretrained(source, classifier("small", global_pool=True), {"model": "small"})


def test_files_that_are_no_vision_transformer_are_told(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="names that are known here: facebookresearch/mae's, timm's, Hugging Face's"):
        weights.load_pretrained(str(tmp_path / "resnet.safetensors"), classifier("small"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="broken.safetensors is not a whole"):
        load_checkpoint(str(tmp_path / "broken.safetensors"))


def test_all_zero_positions_are_warned_of(tmp_path, capsys):
    """A model that transformers builds from a configuration has positions of zero."""
    config = transformers.ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings.zero_()
    theirs.save_pretrained(tmp_path / "hf")
    weights.load_pretrained(str(tmp_path / "hf"), classifier("small", global_pool=True))
    said = capsys.readouterr().out
    assert "positions are all zero" in said and "LayerNorm eps of 1e-12; the models here use 1e-6" in said
    assert "(Hugging Face's ViTMAE, encoder and decoder)" in said


def test_the_commands_take_hugging_faces_folders(images, tmp_path, capsys):
    """Pre-training resumes from one, fine-tuning starts from one, and a classifier's is evaluated and predicts."""
    small = ["--device", "cpu", "--amp", "off", "--num_workers", "0", "--batch_size", "16", "--input_size", "28"]
    train = [*small, "--data_path", str(images), "--epochs", "1", "--warmup_epochs", "0"]
    mae = ["--model", "mae_vit_demo_patch4", "--monitor_freq", "0"]
    main_pretrain.main([*train, *mae, "--output_dir", str(tmp_path / "a")])
    folder = export(str(tmp_path / "a" / "checkpoint-0.pth"), "hf", tmp_path / "hf")
    main_pretrain.main([*train, *mae, "--output_dir", str(tmp_path / "b"), "--resume", str(folder)])
    vit = ["--model", "vit_demo_patch4", "--nb_classes", "10", "--cls_token"]
    main_finetune.main([*train, *vit, "--output_dir", str(tmp_path / "c"), "--finetune", str(folder)])
    said = capsys.readouterr().out
    assert "holds no optimiser: starting at epoch 0" in said
    assert "(Hugging Face's ViTMAE, encoder and decoder); new here: head.*" in said
    main_reconstruct.main(
        ["--resume", str(folder), "--images", str(images / "val"), "--output", str(tmp_path / "r.png"), "--num", "2"]
    )
    named = export(str(tmp_path / "c" / "checkpoint-0.pth"), "hf", tmp_path / "named")
    evaluate = [*small, *vit, "--eval", "--data_path", str(images), "--resume"]
    capsys.readouterr()
    main_finetune.main([*evaluate, str(tmp_path / "c" / "checkpoint-0.pth")])
    ours = capsys.readouterr().out.splitlines()[-1]
    main_finetune.main([*evaluate, str(named)])
    assert capsys.readouterr().out.splitlines()[-1] == ours
    main_predict.main(["--resume", str(named), "--images", str(images / "val"), "--output", str(tmp_path / "p.csv")])
    classes = json.loads((named / "config.json").read_text())["label2id"]
    assert (tmp_path / "p.csv").read_text().splitlines()[1].split(",")[1] in classes

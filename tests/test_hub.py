"""torch.hub: models and their sizes come from the checkpoint, with the weights, from any folder."""

import pathlib
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

import models_load
import models_mae
import models_vit
from util.checkpoint import weights
from util.errors import UserError

GREY = {"img_size": 28, "in_chans": 1}
PIXELS = {"mean": [0.25], "std": [0.5], "crop_pct": 0.75}


def load(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


def saved(path, model, **args):
    torch.save({"model": model.state_dict(), "model_config": model.config, "args": PIXELS | args}, path)
    return str(path)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An autoencoder of the demo's size for grey images of 28 pixels, and its file."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_demo_patch4(**GREY, norm_pix_loss=True).eval()
    return model, saved(tmp_path_factory.mktemp("hub") / "mae.pth", model)


def test_a_new_head_reads_the_file_once(autoencoder, monkeypatch):
    """An address would be downloaded a second time."""
    monkeypatch.setattr(weights, "load_checkpoint", None)
    assert load("vit_demo_patch4", weights=autoencoder[1], num_classes=5).config["num_classes"] == 5


def test_an_autoencoder_has_the_files_sizes_and_weights(autoencoder):
    model, file = autoencoder
    loaded = load("mae_vit_demo_patch4", weights=file).eval()
    assert loaded.config == model.config
    imgs, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 49)
    with torch.no_grad():
        assert torch.equal(loaded(imgs, 0.75, noise)[0], model(imgs, 0.75, noise)[0])


def test_an_encoder_comes_from_any_checkpoint(autoencoder):
    model, file = autoencoder
    encoder = load("encoder", weights=file).eval()
    imgs = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        expected = model.forward_encoder(imgs, 0.0, torch.arange(49.0).expand(2, -1))[0]
        torch.testing.assert_close(encoder.forward_features(imgs), expected)
        torch.testing.assert_close(encoder(imgs), expected[:, 0])


def test_an_encoder_that_pools_the_patches_does_so(tmp_path):
    trained = models_vit.vit_demo_patch4(**GREY, num_classes=3).eval()
    encoder = load("encoder", weights=saved(tmp_path / "classifier.pth", trained)).eval()
    imgs = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(encoder(imgs), encoder.fc_norm(encoder.forward_features(imgs)[:, 1:].mean(dim=1)))


def test_timm_makes_the_transform_of_the_checkpoints_images(autoencoder):
    description = load("encoder", weights=autoencoder[1]).pretrained_cfg
    data = timm.data.resolve_data_config(description)
    assert (data["input_size"], data["mean"], data["std"]) == ((1, 28, 28), (0.25,), (0.5,))
    assert (data["crop_pct"], data["interpolation"]) == (0.75, "bicubic")


def test_a_classifier_has_the_files_head_or_a_new_one(autoencoder, tmp_path):
    trained = models_vit.vit_demo_patch4(**GREY, num_classes=3).eval()
    file = saved(tmp_path / "classifier.pth", trained)
    imgs = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(load("vit_demo_patch4", weights=file).eval()(imgs), trained(imgs))

        assert torch.equal(load("vit_demo_patch4", weights=file, num_classes=3).eval()(imgs), trained(imgs))

    # So does a probe, whose head has another name.
    probe = models_vit.make_linear_probe(models_vit.vit_demo_patch4(**GREY, num_classes=3)).eval()
    torch.nn.init.normal_(probe.head[1].weight)
    with torch.no_grad():
        again = load("vit_demo_patch4", weights=saved(tmp_path / "probe.pth", probe), num_classes=3).eval()
        assert torch.equal(again(imgs), probe(imgs))

    # Of a file without a head, 0 classes are a model without one.
    assert isinstance(load("vit_demo_patch4", weights=autoencoder[1], num_classes=0).head, torch.nn.Identity)

    # A new head keeps the pooling that the file tells.
    assert load("vit_demo_patch4", weights=file, num_classes=5).config["global_pool"] is True
    by_token = saved(tmp_path / "token.pth", models_vit.vit_demo_patch4(**GREY, num_classes=3, global_pool=False))
    assert load("vit_demo_patch4", weights=pathlib.Path(by_token), num_classes=5).config["global_pool"] is False

    # A new head takes the encoder of both kinds of files, with another pooling and another size where these are given.
    for source, encoder in ((autoencoder[1], autoencoder[0]), (file, trained)):
        model = load("vit_demo_patch4", weights=source, num_classes=5, img_size=56, drop_path_rate=0.1)
        assert (
            model.head.out_features == 5 and model.patch_embed.grid_size == (14, 14) and model.config["in_chans"] == 1
        )
        assert torch.equal(model.blocks[5].mlp.fc2.weight, encoder.blocks[5].mlp.fc2.weight)
        assert model.pretrained_cfg["input_size"] == [1, 56, 56] and model.pretrained_cfg["num_classes"] == 5


def test_without_weights_values_are_random_and_arguments_are_the_constructors():
    model = load("mae_vit_tiny_patch16", weights=None, img_size=32, patch_size=8, norm_pix_loss=True)
    assert model.patch_embed.num_patches == 16 and model.norm_pix_loss
    assert load("vit_tiny_patch16", weights=None, img_size=32, num_classes=7).head.out_features == 7


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "mae_vit_base_patch16",
            {"weights": "FILE"},
            "does not hold mae_vit_base_patch16: its encoder has width 128, 6",
        ),
        ("mae_vit_demo_patch4", {"weights": "FILE", "img_size": 32}, "img_size: the file decides that"),
        ("vit_demo_patch4", {"weights": "FILE"}, "has no head: pass num_classes=N"),
        ("encoder", {"weights": None}, "name a checkpoint"),
        (
            "mae_vit_large_patch16",
            {},
            r"no weights of this size \(large\) come with the code: pass weights=FILE_OR_URL",
        ),
        ("encoder", {"weights": "/nowhere.pth"}, "cannot read /nowhere.pth"),
    ],
)
def test_what_does_not_fit_is_said(name, arguments, message, autoencoder):
    arguments = {key: autoencoder[1] if value == "FILE" else value for key, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        load(name, **arguments)


def test_the_head_of_a_self_supervised_method_is_no_classifier(tmp_path):
    encoder = models_vit.vit_demo_patch4(**GREY, num_classes=0)
    state = encoder.state_dict() | {"head.mlp.0.weight": torch.zeros(8, 128)}
    torch.save({"model": state, "model_config": encoder.config}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="dino.pth has no head: pass num_classes=N"):
        load("vit_demo_patch4", weights=str(tmp_path / "dino.pth"))
    with pytest.raises(UserError, match="dino.pth has no head, so it cannot predict classes"):
        models_load.classifier({"model": state, "model_config": encoder.config}, "dino.pth")


def test_the_weights_that_come_with_the_code_are_those_of_a_trained_model():
    """They are the default, and predict patches of photographs better than by their mean, which has a loss of 1."""
    model = load("mae_vit_demo_patch4").eval()
    assert model.config["img_size"] == 32 and model.norm_pix_loss
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    photos = sorted((ROOT / "tests" / "photos").glob("*.jpg"))
    imgs = torch.stack([transform(Image.open(path).convert("RGB")) for path in photos])
    with torch.no_grad():
        loss, _, _ = model(imgs, 0.75, torch.rand(len(imgs), 64, generator=torch.Generator().manual_seed(0)))
        features = load("encoder").eval()(imgs)
        tokens = model.forward_encoder(imgs, 0.0, torch.arange(64.0).expand(len(imgs), -1))[0]
    assert loss < 0.6
    torch.testing.assert_close(features, tokens[:, 0])
    assert load("vit_demo_patch4", num_classes=10).head.out_features == 10


def test_every_model_has_an_entry():
    import hubconf

    for name in (*models_mae.MODELS, *models_vit.MODELS):
        assert callable(getattr(hubconf, name)) and getattr(hubconf, name).__doc__
    # torch.hub lists all functions that are public: nothing else may be among them.
    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == {"encoder", *models_mae.MODELS, *models_vit.MODELS}


def test_it_works_from_another_folder(autoencoder, tmp_path):
    """Where the repository's modules can be imported only while torch.hub loads the model."""
    code = (
        f"import torch; load = lambda name, **more: torch.hub.load({str(ROOT)!r}, name, source='local', **more)\n"
        f"model = load('vit_demo_patch4', weights={autoencoder[1]!r}, num_classes=3)\n"
        "print(tuple(model(torch.zeros(2, 1, 28, 28)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(2, 3)"], done.stderr

"""The recipe for segmentation: the exported encoder in segmentation_models_pytorch and timm, masks, mean IoU."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES
from sklearn.metrics import jaccard_score
from torchvision.transforms import v2

import main_export
import models_vit

pytest.importorskip("segmentation_models_pytorch")
from recipes.segmentation import garments, train


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder for grey images of 28 pixels, with its --mean and --std, and the folder of its export for timm."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = models_vit.vit_demo_patch4(img_size=28, in_chans=1, num_classes=0, global_pool=False)
    checkpoint = {"model": model.state_dict(), "model_config": model.config, "args": {"mean": [0.25], "std": [0.5]}}
    torch.save(checkpoint, folder / "encoder.pth")
    main_export.main(["--resume", str(folder / "encoder.pth"), "--to", "timm", "--output", str(folder / "timm")])
    return model, folder / "timm"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Eight training and four validation images of two classes, with the masks of garments.py."""
    for split, count in (("train", 8), ("val", 4)):
        for name in ("bag", "dress"):
            (tmp_path / "samples" / split / name).mkdir(parents=True)
            for file in sorted((SAMPLES / split / name).iterdir())[:count]:
                shutil.copy(file, tmp_path / "samples" / split / name)
    monkeypatch.setattr(garments, "SAMPLES", tmp_path / "samples")
    monkeypatch.setattr(sys, "argv", ["garments.py", str(tmp_path / "data")])
    garments.main()
    return tmp_path / "data"


def arguments(encoder, **changed):
    return argparse.Namespace(**{"encoder": encoder, "scratch": False, "classes": 3, "size": 32, "width": 16} | changed)


def test_the_model_has_the_exported_encoder(exported):
    model, folder = exported
    loaded = train.Segmenter(arguments(folder)).net.encoder.model.state_dict()
    expected = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert loaded["pos_embed"].shape == (1, 65, 128)  # for 8 x 8 patches

    fresh = train.Segmenter(arguments(folder, scratch=True)).net.encoder.model.state_dict()
    assert fresh.keys() == loaded.keys() and not torch.equal(
        fresh["blocks.0.mlp.fc1.weight"], loaded["blocks.0.mlp.fc1.weight"]
    )


def test_images_are_normalised_as_in_pretraining(exported):
    model = train.Segmenter(arguments(exported[1]))
    seen = []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert model(images).shape == (2, 3, 32, 32)
    torch.testing.assert_close(seen[0], (images / 255 - 0.25) / 0.5)


def test_timm_takes_features_of_several_blocks(exported):
    model, folder = exported
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=[2, 5])
    images, outputs = torch.randn(2, 1, 28, 28), []
    for block in (2, 5):
        model.blocks[block].register_forward_hook(lambda module, args, output: outputs.append(output))
    model.eval().forward_features(images)
    for found, expected in zip(peer.eval()(images), outputs, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_masks_are_the_garments_and_are_flipped_with_them(data):
    pairs = train.MaskedImages(data / "train", 1, v2.RandomHorizontalFlip())
    assert len(pairs) == 16
    for index, expected in ((0, 1), (15, 2)):
        image, mask = pairs[index]
        flips = {tuple(image.flatten().tolist()) for image, _ in (pairs[index] for _ in range(16))}
        assert len(flips) == 2 and image.shape == (1, 28, 28) and mask.dtype == torch.long
        for _ in range(8):
            image, mask = pairs[index]
            assert torch.equal(mask, (image[0] > 0).long() * expected)


def test_masks_keep_their_numbers_when_they_are_resized(data):
    pairs = train.MaskedImages(data / "val", 3, v2.Resize((32, 32), antialias=True))
    image, mask = pairs[7]
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and mask.unique().tolist() == [0, 2]


def test_a_mask_that_is_missing_is_named(data):
    gone = next((data / "val" / "masks").rglob("*.png"))
    gone.unlink()
    with pytest.raises(SystemExit, match=gone.name):
        train.MaskedImages(data / "val", 1, v2.Identity())


def test_the_mean_iou_is_scikit_learns():
    """Over all pixels of all batches; ignored pixels and classes that are nowhere do not count."""
    torch.manual_seed(0)
    masks = torch.randint(0, 4, (5, 8, 8))
    masks[torch.rand(masks.shape) < 0.1] = train.IGNORED
    predicted = torch.where(torch.rand(masks.shape) < 0.5, masks.clamp(max=3), torch.randint(0, 4, masks.shape))
    logits = torch.nn.functional.one_hot(predicted, 5).permute(0, 3, 1, 2).float()
    model = torch.nn.Identity()
    loader = [(logits[:3], masks[:3]), (logits[3:], masks[3:])]
    mean, each = train.mean_iou(model, loader, 5, "cpu")
    counted = masks != train.IGNORED
    expected = 100 * jaccard_score(masks[counted], predicted[counted], average=None)
    assert each[:4] == pytest.approx(list(expected), abs=1e-3) and np.isnan(each[4])
    assert mean == pytest.approx(expected.mean(), abs=1e-3)


def test_the_recipe_learns_and_keeps_a_log(exported, data, tmp_path, monkeypatch):
    flags = {"classes": 3, "size": 32, "epochs": 6, "batch_size": 4, "width": 16, "lr": 2e-3, "device": "cpu"}
    flags |= {"encoder": exported[1], "data_path": data, "output_dir": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in flags.items())])
    train.main()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(6))
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"] and log[-1]["test_miou"] > 40
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    train.Segmenter(arguments(exported[1])).net.load_state_dict(state)
    assert not torch.equal(state["encoder.model.blocks.0.mlp.fc1.weight"], exported[0].blocks[0].mlp.fc1.weight)

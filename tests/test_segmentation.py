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
from PIL import Image
from sklearn.metrics import jaccard_score
from torchvision.transforms import v2

import main_export
import models_vit
from util.data.images import PixelSpec
from util.errors import UserError

pytest.importorskip("segmentation_models_pytorch")
from recipes.segmentation import garments, train

GREY = PixelSpec(1, (0.25,), (0.5,))


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


def test_garments_of_fewer_images_do_not_mix_with_those_that_are_there(data, monkeypatch):
    garments.main()  # the same files again
    monkeypatch.setattr(sys, "argv", ["garments.py", str(data), "--images", "2"])
    with pytest.raises(UserError, match=r"train/images/bag/\w+.png would not belong .* choose another folder"):
        garments.main()


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
    pairs = train.MaskedImages(data / "train", GREY, 3, v2.RandomHorizontalFlip())
    assert len(pairs) == 16 and pairs.files[0].parent.name == "bag"
    for index, expected in ((0, 1), (15, 2)):
        image, mask = pairs[index]
        flips = {tuple(image.flatten().tolist()) for image, _ in (pairs[index] for _ in range(16))}
        assert len(flips) == 2 and image.shape == (1, 28, 28) and mask.dtype == torch.long
        for _ in range(8):
            image, mask = pairs[index]
            assert torch.equal(mask, (image[0] > 0).long() * expected)


def test_a_few_of_each_class(data, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["garments.py", str(tmp_path / "few"), "--images", "3"])
    garments.main()
    few, all_of_them = (train.MaskedImages(tmp_path / name / "train", GREY, 3, None).files for name in ("few", "data"))
    assert [file.name for file in few] == [file.name for file in [*all_of_them[:3], *all_of_them[8:11]]]
    assert len(train.MaskedImages(tmp_path / "few" / "val", GREY, 3, None)) == 8


def test_masks_keep_their_numbers_when_they_are_resized(data):
    pairs = train.MaskedImages(data / "val", PixelSpec(), 3, v2.Resize((32, 32), antialias=True))
    image, mask = pairs[7]
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and mask.unique().tolist() == [0, 2]


def spoil(data, kind):
    """Spoil one image or mask."""
    image, mask = (sorted((data / "val" / name).rglob("*.png"))[0] for name in ("images", "masks"))
    if kind == "no mask":
        mask.unlink()
    elif kind == "colour mask":
        Image.new("RGB", (28, 28)).save(mask)
    elif kind == "class 3":
        Image.fromarray(np.full((28, 28), 3, np.uint8)).save(mask)
    elif kind == "turned mask":
        Image.fromarray(np.zeros((14, 28), np.uint8)).save(mask)
    elif kind == "broken mask":
        mask.write_bytes(mask.read_bytes()[:40])
    elif kind == "two images of a mask":
        Image.open(image).save(image.with_suffix(".bmp"))
    elif kind == "no image":
        image.unlink()
        image.write_bytes(b"")
    elif kind == "none":
        shutil.rmtree(data / "val" / "images")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no mask", "1 masks are missing: .*png"),
        ("broken mask", r"masks/.*png cannot be read"),
        ("two images of a mask", "that differ by their ending only have one mask, as .*png"),
        ("colour mask", "has RGB pixels, not one number each"),
        ("class 3", "has class 3: --classes 3 allows 0 to 2"),
        ("turned mask", "masks/.*png is 14 x 28 pixels and its image 28 x 28: make both alike"),
        ("no image", "not an image, or empty: remove it"),
        ("none", "val/images holds no images"),
    ],
)
def test_what_is_wrong_with_the_files_is_said(kind, message, data):
    spoil(data, kind)
    with pytest.raises(UserError, match=message):
        train.MaskedImages(data / "val", GREY, 3, v2.Identity())[0]


def test_deep_images_keep_their_depth_and_other_files_are_left_out(data):
    """As in pre-training, from whose encoder the pixels come."""
    (data / "val" / "images" / "bag" / "Thumbs.db").write_bytes(b"x")
    file = sorted((data / "val" / "images").rglob("*.png"))[0]
    file.unlink()
    Image.fromarray(np.linspace(0, 65535, 784).reshape(28, 28).astype(np.uint16)).save(file)
    pairs = train.MaskedImages(data / "val", GREY, 3, v2.Identity())
    assert len(pairs) == 8
    image, _ = pairs[0]
    torch.testing.assert_close(image.flatten(), torch.linspace(0, 1, 784), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"size": 30}, "--size 30 must be a multiple of the encoder's patch size, 4"),
        ({"encoder": "/nowhere"}, "is no export for timm"),
        ({"device": "foo"}, "--device foo"),
        ({"num_workers": -1}, "--num_workers -1 must be at least 0"),
        ({"epochs": 0}, "--epochs, --eval_freq, --batch_size and --width must be at least 1"),
        ({"encoder_lr": -1}, "--encoder_lr -1.0 must be at least 0"),
        ({"size": 36}, "--size 36: DPT can't join the maps of this size"),
        ({"batch_size": 1}, "BatchNorm has one value to go by: raise --batch_size or --size"),
        ({"data_path": None}, "--data_path or --predict is needed"),
        ({"data_path": None, "predict": "here"}, "model.pth does not exist: train first"),
    ],
)
def test_bad_flags_end_in_a_message(flags, message, exported, data, tmp_path, refusal, monkeypatch):
    given = {
        "encoder": exported[1],
        "classes": 3,
        "size": 32,
        "data_path": data,
        "output_dir": tmp_path / "out",
    } | flags
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert message in refusal(train.main)


def test_without_the_library_the_message_names_it(exported, monkeypatch, refusal):
    monkeypatch.setattr(train, "smp", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--encoder=x", "--classes=3", "--size=32", "--output_dir=x"])
    assert "pip install segmentation_models_pytorch" in refusal(train.main)


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
    assert each[:4] == pytest.approx(list(expected), abs=1e-3) and each[4] is None
    assert mean == pytest.approx(expected.mean(), abs=1e-3)


def test_the_recipe_learns_and_keeps_a_log(exported, data, tmp_path, monkeypatch, refusal):
    flags = {
        "num_workers": 0,
        "classes": 3,
        "size": 32,
        "epochs": 6,
        "eval_freq": 4,
        "batch_size": 4,
        "width": 16,
        "lr": 2e-3,
        "device": "cpu",
    }
    flags |= {"encoder": exported[1], "data_path": data, "output_dir": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in flags.items())])
    train.main()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(6))
    assert [line["epoch"] for line in log if "test_miou" in line] == [3, 5]
    assert "holds a run: choose another folder, or pass --overwrite" in refusal(train.main)
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"] and log[-1]["test_miou"] > 40
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    model = train.Segmenter(arguments(exported[1]))
    model.net.load_state_dict(state)

    # The masks that it predicts for other images are those of the trained model.
    del flags["data_path"]
    flags["predict"] = data / "val" / "images"
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in flags.items())])
    train.main()
    masks = sorted((tmp_path / "out" / "predicted").rglob("*.png"))
    assert [path.parent.name for path in masks] == ["bag"] * 4 + ["dress"] * 4
    resize = v2.Resize((32, 32), antialias=True)
    image, _ = train.MaskedImages(data / "val", GREY, 3, resize)[5]
    with Image.open(masks[5]) as file, torch.no_grad():
        assert np.array_equal(np.array(file), model.eval()(image[None]).argmax(dim=1)[0].numpy())
    assert not torch.equal(state["encoder.model.blocks.0.mlp.fc1.weight"], exported[0].blocks[0].mlp.fc1.weight)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--width=32"])
    assert "is of another model than the flags describe: pass --encoder, --classes" in refusal(train.main)
    (tmp_path / "out" / "model.pth").write_bytes(b"damaged")
    assert "model.pth can't be read (UnpicklingError): train again" in refusal(train.main)
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--predict={tmp_path / 'out' / 'predicted'}"])
    assert "is where the masks are written: choose another --output_dir" in refusal(train.main)


def test_a_batch_without_pixels_that_count_changes_nothing(exported):
    model = train.Segmenter(arguments(exported[1]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    images, masks = torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.full((2, 32, 32), train.IGNORED)
    assert train.update(model, optimizer, images, masks) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks[0, 0, 0] = 1
    assert train.update(model, optimizer, images, masks) > 0

"""Shapes and kinds of images: grey, 16-bit, many channels, rectangles, and folders without classes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES
from PIL import Image
from safetensors.torch import load_file

import main_features
import main_finetune
import main_linprobe
import main_pretrain
import main_reconstruct
import models_mae
from scripts import mean_std
from util.data import datasets, loaders
from util.data.images import PixelSpec, WrongChannels, load_array
from util.data.splits import DataSpec
from util.data.transforms import CentreCrop, Crop
from util.errors import UserError
from util.pos_embed import resize_pos_embed, sincos_pos_embed

SMALL = "--batch_size 4 --num_workers 0 --device cpu --amp off --warmup_epochs 0 --epochs 1 --monitor_freq 1"


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def save_grey(path, number):
    Image.open(sorted((SAMPLES / "train").glob("*/*.png"))[number * 7]).convert("L").save(path.with_suffix(".png"))


def save_colour(path, number):
    Image.fromarray(random_pixels(70 + number, 100, 3)).save(path.with_suffix(".png"))


def save_bands(path, number):
    values = np.random.default_rng(number).normal(1000, 300, (64, 64, 13)).astype(np.float32)
    np.save(path.with_suffix(".npy"), values if number % 2 else values.transpose(2, 0, 1))


def save_16_bit(path, number):
    values = np.random.default_rng(number).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(path.with_suffix(".png"))


CASES = {
    "grey": (save_grey, "--in_chans 1 --input_size 28 --patch_size 4"),
    "rectangle": (save_colour, "--input_size 64 96 --patch_size 16"),
    "bands": (save_bands, f"--in_chans 13 --input_size 64 --patch_size 8 --mean {'1000 ' * 13}--std {'300 ' * 13}"),
    "sixteen": (save_16_bit, "--in_chans 1 --input_size 32 --patch_size 8 --mean 0.5 --std 0.3"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_job_takes_the_images(case, tmp_path):
    """All scripts run one after another, and those that read a checkpoint take channels, mean and std from it."""
    make, shape = CASES[case]
    for split, count in (("train", 4), ("val", 2)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                make(tmp_path / split / name / f"{number}", number + (name == "b"))
    common = [*SMALL.split(), *shape.split(), "--data_path", str(tmp_path)]
    out = tmp_path / "pretrain"
    decoder = f"--model mae_vit_demo_patch4 --decoder_dim 24 --decoder_depth 1 --decoder_heads 3 --output_dir {out}"
    main_pretrain.main([*common, *decoder.split(), "--norm_pix_loss"])
    stored = torch.load(out / "checkpoint-0.pth", weights_only=True)
    assert stored["model"]["decoder_blocks.0.attn.qkv.weight"].shape == (72, 24)
    (line,) = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert np.isfinite(line["train_loss"]) and np.isfinite(line["test_loss"])
    assert len(list((out / "reconstructions").glob("*.png"))) == 1
    for job, words in ((main_finetune, "--reprob 0.5"), (main_linprobe, "--cls_token")):
        job.main(
            [
                *SMALL.replace("--monitor_freq 1", "").split(),
                *shape.split(),
                *words.split(),
                "--data_path",
                str(tmp_path),
                *f"--model vit_demo_patch4 --nb_classes 2 --finetune {out / 'checkpoint-0.pth'}".split(),
                "--output_dir",
                str(tmp_path / job.__name__),
            ]
        )
    small = ["--resume", str(out / "checkpoint-0.pth"), "--device", "cpu", "--output"]
    main_reconstruct.main([*small, str(tmp_path / "grid.png"), "--images", str(tmp_path / "val")])
    assert Image.open(tmp_path / "grid.png").width > 4 * 100
    main_features.main([*small, str(tmp_path / "f.npz"), "--data_path", str(tmp_path / "val")])
    assert np.isfinite(np.load(tmp_path / "f.npz")["features"]).all()


@pytest.mark.parametrize("place", ["train", "."])
def test_pretraining_takes_a_folder_without_classes(place, tmp_path, monkeypatch):
    data = tmp_path / "data"
    (data / place).mkdir(parents=True, exist_ok=True)
    (data / place / "deeper").mkdir()
    for number in range(6):
        save_grey(data / place / ("deeper" if number % 2 else "") / f"{number}", number)
    out = ["--output_dir", str(tmp_path / "out"), "--data_path", str(data)]
    main_pretrain.main([*SMALL.split(), *["--model", "mae_vit_demo_patch4", "--input_size", "28"], *out])
    monkeypatch.chdir(data)
    for path in (str(data), "."):
        found = datasets.open_split(datasets.Images, DataSpec(path), "train", None, PixelSpec(), classes_optional=True)
        assert len(found) == 6
    for folder in data.rglob("deeper"):
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="must hold train/<class>/<images>|has no class folders"):
        main_linprobe.main(
            [
                "--model",
                "vit_demo_patch4",
                "--input_size",
                "28",
                "--nb_classes",
                "2",
                "--data_path",
                str(data),
                "--output_dir",
                "",
                "--device",
                "cpu",
            ]
        )


def test_files_become_the_channels_that_are_asked_for(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (5, 6)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    assert np.array_equal(
        load_array(str(tmp_path / "16.png"), PixelSpec(1))[..., 0], (values / 65535).astype(np.float32)
    )
    rgba = random_pixels(5, 6, 4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(load_array(str(tmp_path / "rgba.png"), PixelSpec(4)), rgba)
    assert load_array(str(tmp_path / "rgba.png"), PixelSpec(1)).shape == (5, 6, 1)
    pages = [Image.fromarray(page) for page in np.random.default_rng(1).integers(0, 65536, (7, 5, 6)).astype(np.uint16)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    stacked = load_array(str(tmp_path / "pages.tif"), PixelSpec(7))
    assert np.array_equal(stacked[..., 3], (np.asarray(pages[3]) / 65535).astype(np.float32))
    np.save(tmp_path / "whole.npy", np.arange(90).reshape(5, 6, 3).astype(np.int32))
    # Values are not scaled, whatever their range.
    assert load_array(str(tmp_path / "whole.npy"), PixelSpec(3)).max() == 89
    np.save(tmp_path / "float.npy", np.full((3, 5, 6), 7.5))
    assert (load_array(str(tmp_path / "float.npy"), PixelSpec(3)) == 7.5).all()
    with pytest.raises(WrongChannels, match=r"--in_chans 5, but this file has 7 page\(s\) of 1 channel"):
        load_array(str(tmp_path / "pages.tif"), PixelSpec(5))
    with pytest.raises(WrongChannels, match=r"--in_chans 2, but this array is \[3, 5, 6\]"):
        load_array(str(tmp_path / "float.npy"), PixelSpec(2))


def test_wrong_channels_end_a_run_before_it_begins(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(4):
        save_bands(tmp_path / "train" / "a" / str(number), number)
    words = f"--in_chans 4 --mean {'0 ' * 4}--std {'1 ' * 4}--output_dir={tmp_path / 'o'} --device cpu --batch_size 2"
    with pytest.raises(UserError, match=r"0.npy: --in_chans 4, but this array is \[13, 64, 64\]"):
        main_pretrain.main([*words.split(), "--data_path", str(tmp_path), "--model", "mae_vit_demo_patch4"])


def test_files_of_8_and_16_bits_meet_in_a_batch(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    save_grey(tmp_path / "train" / "a" / "0", 0)
    save_16_bit(tmp_path / "train" / "a" / "1", 0)
    pixels = PixelSpec(1, (0.0,), (1.0,))
    for workers in (0, 1):
        crop = Crop(16, (1.0, 1.0))
        loader = loaders.train_loader(
            DataSpec(str(tmp_path)), crop, pixels, loaders.Loading(2, workers, False, 0, torch.device("cpu"))
        )
        ((imgs, _),) = loader
        assert imgs.dtype == torch.float32 and imgs.max() < 1.3 and (imgs.amax(dim=(1, 2, 3)) > 0.2).all()


def test_a_rectangle_is_covered_then_cut(tmp_path):
    stripes = np.zeros((40, 100, 3), np.uint8)
    stripes[:, 50:] = 255
    out = CentreCrop((16, 32), 1.0)(stripes)
    assert out.shape == (3, 16, 32) and out[:, :, :15].max() < 60 and out[:, :, 17:].min() > 200
    assert CentreCrop((32, 16), 0.5)(stripes).shape == (3, 32, 16)
    assert CentreCrop((64, 64))(random_pixels(33, 71, 5)).shape == (5, 64, 64)


def test_mean_and_standard_deviation_of_a_folder(tmp_path, capsys):
    for number in range(3):
        save_bands(tmp_path / str(number), number)
    mean_std.main([str(tmp_path), "--in_chans", "13"])
    words = capsys.readouterr().out.split()
    mean, std = (list(map(float, words[words.index(f"--{name}") + 1 :][:13])) for name in ("mean", "std"))
    assert mean == pytest.approx([1000] * 13, abs=30) and std == pytest.approx([300] * 13, abs=20)


def test_positions_resize_as_the_references_and_alike_along_both_sides():
    """Transposing an image transposes its table of positions, also when the table is resized."""
    golden = load_file(ROOT / "tests" / "golden" / "pos_embed.safetensors")
    assert golden  # its values are checked in test_golden.py
    h, w = 6, 10
    table = torch.randn(1, 1 + h * w, 8)

    def transposed(table, rows, columns):
        grid = table[:, 1:].unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
        return torch.cat([table[:, :1], grid], dim=1)

    square = resize_pos_embed(torch.randn(1, 1 + 4 * 16, 8), (4, 16), (8, 8))
    assert not torch.equal(square, resize_pos_embed(square, (4, 16), (8, 8)))  # as many patches, another shape
    resized = resize_pos_embed(table, (h, w), (9, 4))
    other = resize_pos_embed(transposed(table, h, w), (w, h), (4, 9))
    torch.testing.assert_close(transposed(resized, 9, 4), other)
    sincos = sincos_pos_embed(16, (h, w))
    swapped = transposed(sincos_pos_embed(16, (w, h)), w, h)
    torch.testing.assert_close(sincos[..., :8], swapped[..., 8:])  # rows of one are columns of the other
    smooth = resize_pos_embed(sincos_pos_embed(32, (14, 14)).float(), (14, 14), (14, 20))
    columns = smooth[0, 1:].unflatten(0, (14, 20))
    torch.testing.assert_close(columns[:, :, 16:], columns[:, :1, 16:].expand(-1, 20, -1))  # rows stay as they were


def test_finetuning_at_another_size_and_aspect(images, tmp_path, capsys):
    flags = f"{SMALL} --data_path {images}".replace("--monitor_freq 1", "").split()
    main_pretrain.main([*flags, *f"--model mae_vit_demo_patch4 --input_size 24 32 --output_dir {tmp_path}".split()])
    for size in ("28", "32 24", "24 32"):
        main_finetune.main(
            [
                *flags,
                *f"--model vit_demo_patch4 --nb_classes 10 --output_dir= --input_size {size}".split(),
                "--finetune",
                str(tmp_path / "checkpoint-0.pth"),
            ]
        )
    said = capsys.readouterr().out
    assert "positions resized from 6 x 8 to 7 x 7" in said and "positions resized from 6 x 8 to 8 x 6" in said
    assert said.count("positions resized") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--in_chans 5", "--in_chans 5 needs --mean and --std, 5 numbers each: scripts/mean_std.py"),
        ("--in_chans 2 --mean 0 --std 1 1", "--mean needs 2 numbers"),
        ("--std 0 1 1 --mean 0 0 0", "--std 0.0 1.0 1.0: must be greater than 0"),
        ("--input_size 32 33", "--input_size 32 33 is not a multiple of the patch size, 4"),
        ("--input_size 32 32 32", "one size, or height and width"),
        ("--decoder_dim 30 --decoder_heads 4", "--decoder_dim 30 must be a multiple of 4 and of --decoder_heads 4"),
        ("--decoder_depth 0", "--decoder_depth 0 must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_said(flags, message, images):
    with pytest.raises(UserError, match=message):
        words = f"--model mae_vit_demo_patch4 --device cpu --output_dir= --data_path {images} {flags}"
        main_pretrain.main(words.split())


def test_a_models_picture_of_many_channels_is_its_first_three():
    model = models_mae.MODELS["mae_vit_demo_patch4"](img_size=(8, 12), in_chans=5)
    imgs = torch.randn(2, 5, 8, 12)
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)

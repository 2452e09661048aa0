"""Monitoring and small scripts: reconstructions, masks, k-NN, features and predictions."""

import argparse
import json

import faults
import numpy as np
import pytest
import torch
from PIL import Image
from runs import job_argv, log, state

import main_features
import main_linprobe
import main_predict
import main_pretrain
import main_reconstruct
import models_load
import models_mae
import models_vit
from util import inference, masking
from util.data import splits
from util.errors import UserError
from util.report import knn, pictures

CPU = torch.device("cpu")
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))


def autoencoder(norm_pix_loss=False):
    torch.manual_seed(0)
    return models_mae.MaskedAutoencoderViT(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        norm_pix_loss=norm_pix_loss,
    )


def random_pixels():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_predictor_gives_back_the_original(norm_pix_loss):
    model, imgs = autoencoder(norm_pix_loss), (random_pixels() - MEAN) / STD
    rows = pictures.panels(model, imgs, model.target(imgs), torch.ones(3, 16), MEAN, STD)
    assert (rows[:, 2] - random_pixels()).abs().max() < 1e-5 and (rows[:, 3] - random_pixels()).abs().max() < 1e-5


def test_values_of_other_units_are_shown_in_the_originals_range():
    model = autoencoder()
    raw = torch.rand(2, 3, 16, 16) * torch.tensor([3600.0, 1.0])[:, None, None, None]
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    imgs = (raw - mean) / std
    pred = model.patchify(imgs)
    shown = pictures.panels(model, imgs, pred, torch.ones(pred.shape[:2]), mean, std)
    low, high = raw[0].min(), raw[0].max()
    for panel in (0, 2, 3):
        torch.testing.assert_close(shown[0, panel], (raw[0] - low) / (high - low), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shown[1, panel], raw[1], rtol=1e-4, atol=1e-5)


def test_visible_patches_are_the_inputs_own_and_masked_ones_grey():
    model, imgs = autoencoder(), (random_pixels() - MEAN) / STD
    noise = torch.rand(3, 16)
    rows = pictures.reconstruct(model, imgs, 0.75, noise, MEAN, STD)
    _, mask, _ = model.random_masking(noise[..., None], 0.75, noise)
    hidden = model.unpatchify(mask[..., None].expand(-1, -1, 48)).bool()
    original, masked, reconstruction, mixed = rows.unbind(1)
    assert torch.equal(mixed[~hidden], original[~hidden]) and torch.equal(masked[~hidden], original[~hidden])
    assert (original - random_pixels()).abs().max() < 1e-6 and (masked[hidden] == 0.5).all()
    assert torch.equal(mixed[hidden], reconstruction[hidden])
    assert not torch.allclose(reconstruction[~hidden], original[~hidden], atol=0.01), "the model's, not the input"
    assert model.training, "the model's mode is put back"


def removed_patches(kind, ratio, grid=(14, 14), N=200):
    noise = masking.noise(kind, N, grid, CPU, torch.Generator().manual_seed(0))
    keep = int(grid[0] * grid[1] * (1 - ratio))
    return (noise.argsort(1).argsort(1) >= keep).reshape(N, *grid)


def test_grid_masks_keep_one_of_every_four_patches_regularly():
    mask = removed_patches("grid", 0.75)
    assert not mask[:, ::2, ::2].any() and mask[:, 1::2].all() and mask[:, :, 1::2].all()
    half = removed_patches("grid", 0.5)
    assert not half[:, ::2, ::2].any() and not half[:, 1::2, 1::2].any() and half.float().mean() == 0.5


def test_block_masks_remove_large_blocks():
    """The ratio is met, and unlike in random masks most neighbours of a removed patch are removed, too."""

    def neighbours_alike(mask):
        return (mask[:, 1:] == mask[:, :-1]).float().mean()

    for ratio in (0.5, 0.75):
        blocks, anywhere = removed_patches("block", ratio), removed_patches("random", ratio)
        assert blocks.flatten(1).sum(1).unique().tolist() == anywhere.flatten(1).sum(1).unique().tolist()
        assert neighbours_alike(blocks) > 0.85 > 0.7 > neighbours_alike(anywhere)
    often = removed_patches("block", 0.5, N=1000).float().mean(0)
    assert often.min() > 0.02 and often.max() < 0.9, "every place is removed now and then"
    assert not torch.equal(removed_patches("block", 0.5)[0], removed_patches("block", 0.5)[1])


@pytest.mark.parametrize("kind", masking.KINDS)
def test_fixed_masks_follow_from_seed_and_name_alone(kind):
    one = masking.fixed_noise(kind, ["a/1.png", "b/2.png"], 0, (4, 4), CPU)
    other = masking.fixed_noise(kind, ["b/2.png", "c/3.png"], 0, (4, 4), CPU)
    assert torch.equal(one[1], other[0]) and not torch.equal(one[0], one[1])
    assert not torch.equal(one, masking.fixed_noise(kind, ["a/1.png", "b/2.png"], 1, (4, 4), CPU))


def test_knn_agrees_with_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(300, 8)), generator.normal(size=(130, 8))
    labels, targets = (np.argmax(x[:, :3] + 0.7 * generator.normal(size=(len(x), 3)), 1) for x in (train, test))
    theirs = neighbors.KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train, labels)
    tensors = [torch.tensor(x) for x in (train, labels, test, targets)]
    expected = 100 * theirs.score(test, targets)
    assert 50 < expected < 95
    assert knn.accuracy(*tensors, chunk=50) == pytest.approx(expected) == knn.accuracy(*tensors)


PRETRAIN = (
    "--input_size 28 --batch_size 16 --num_workers 0 --device cpu --amp off --warmup_epochs 0 --lr 3e-3 "
    "--model mae_vit_demo_patch4"
)


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """Output folder of a short pre-training with monitoring."""
    out = tmp_path_factory.mktemp("run")
    words = [*PRETRAIN.split(), "--data_path", str(images), "--output_dir", str(out)]
    main_pretrain.main([*words, "--epochs", "6", "--monitor_freq", "2", "--norm_pix_loss"])
    return out


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_monitors_repeat_and_the_fixed_mask_loss_falls(pretrained, images, tmp_path):
    log = log_lines(pretrained)
    losses = [line["test_loss"] for line in log if "test_loss" in line]
    assert [line["epoch"] for line in log if "test_loss" in line] == [1, 3, 5] and losses[-1] < losses[0]
    assert all(0 <= line["test_knn"] <= 100 for line in log if "test_loss" in line)
    assert sorted(path.name for path in (pretrained / "reconstructions").iterdir()) == [
        "epoch-0001.png",
        "epoch-0003.png",
        "epoch-0005.png",
    ]
    # Monitoring does not change training: the same run without it has the same losses.
    words = [*PRETRAIN.split(), "--data_path", str(images), "--output_dir", str(tmp_path)]
    main_pretrain.main([*words, "--epochs", "6", "--monitor_freq", "0", "--norm_pix_loss"])
    assert [line["train_loss"] for line in log_lines(tmp_path)] == [line["train_loss"] for line in log]
    assert "test_loss" not in log_lines(tmp_path)[-1]


def test_fixed_mask_loss_is_the_same_for_one_and_two_ranks(pretrained, images, tmp_path):
    """A learning rate of 0 leaves the weights alone, so that two evaluations of each run must agree, too."""
    words = [*PRETRAIN.replace("--lr 3e-3", "--lr 0").split(), "--data_path", str(images), "--epochs", "2"]
    words += ["--monitor_freq", "1", "--norm_pix_loss", "--resume_override"]
    results = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        batch = ["--batch_size", str(16 // ranks)]
        weights = tmp_path / "weights.pth"
        torch.save({"model": torch.load(pretrained / "checkpoint-5.pth")["model"]}, weights)
        more = ["--resume", weights, "--output_dir", out]
        output = faults.run_ranks("pretrain", [*words, *batch, *more], tmp_path, world=ranks)
        results += [(line["test_loss"], line["test_knn"]) for line in log_lines(out)]
        assert output.count("monitor after epoch 1:") == 1 and "\r" not in output
    losses = [loss for loss, _ in results]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert len({round(accuracy, 4) for _, accuracy in results}) == 1


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_training_with_other_masks(kind, images, tmp_path):
    words = [*PRETRAIN.split(), "--data_path", str(images), "--output_dir", str(tmp_path), "--epochs", "1"]
    main_pretrain.main([*words, "--mask_sampling", kind, "--mask_ratio", "0.5", "--monitor_freq", "0"])
    assert log_lines(tmp_path)[-1]["train_loss"] < 3


def reconstruct(checkpoint, images, output, *more):
    words = ["--resume", checkpoint, "--images", images / "val", "--output", output, "--device", "cpu", *more]
    main_reconstruct.main(list(map(str, words)))


def test_a_grid_of_reconstructions_is_written(pretrained, images, tmp_path, capsys):
    reconstruct(pretrained / "checkpoint-5.pth", images, tmp_path / "grid.png", "--num", "3")
    out = capsys.readouterr().out
    assert "checkpoint-5.pth, epoch 5, 75% masked (random)" in out and "mean and variance are the original's" in out
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 4 * 160 and sheet.height > 3 * 160
    reconstruct(pretrained / "checkpoint-5.pth", images, tmp_path / "one", "--num", "2", "--separate")
    assert len(list((tmp_path / "one").iterdir())) == 8
    for name in ("a", "b"):  # two images of the same name
        (tmp_path / "alike" / "val" / name).mkdir(parents=True)
        (tmp_path / "alike" / "val" / name / "1.png").symlink_to(next((images / "val" / "bag").iterdir()))
    reconstruct(pretrained / "checkpoint-5.pth", tmp_path / "alike", tmp_path / "two", "--separate")
    assert len(list((tmp_path / "two").iterdir())) == 8


def test_released_style_files_are_recognised_by_their_shapes(pretrained, images, tmp_path):
    """In files without a configuration the encoder's width tells the model; the decoder has the paper's heads."""
    torch.manual_seed(0)
    model = models_mae.MODELS["mae_vit_base_patch16"](img_size=32)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    found = models_load.autoencoder(torch.load(tmp_path / "bare.pth"), "bare.pth")
    assert {**found.config, "norm_pix_loss": False, "mlp_ratio": 4.0} == {**model.config, "img_size": 32}
    tiny = models_mae.MODELS["mae_vit_tiny_patch16"](img_size=32)
    found = models_load.autoencoder({"model": tiny.state_dict()}, "bare.pth")
    assert found.config["decoder_num_heads"] == tiny.config["decoder_num_heads"] == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("encoder", "no decoder, so it"),
        ("linear decoder", "no decoder of Transformer blocks"),
        ("size", "no masked autoencoder"),
    ],
)
def test_unfit_checkpoints_are_refused(spoil, message, pretrained, images, tmp_path):
    checkpoint = torch.load(pretrained / "checkpoint-5.pth", weights_only=False)
    if spoil == "encoder":
        checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if "decoder" not in k and k != "mask_token"}
    elif spoil == "linear decoder":
        checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if "decoder_blocks" not in k}
        del checkpoint["model_config"]
    else:
        checkpoint["model_config"]["patch_size"] = 7
    torch.save(checkpoint, tmp_path / "unfit.pth")
    with pytest.raises(UserError, match=message):
        reconstruct(tmp_path / "unfit.pth", images, tmp_path / "grid.png")
    with pytest.raises(UserError, match="no such file or folder: .*nowhere"):
        reconstruct(pretrained / "checkpoint-5.pth", tmp_path / "nowhere", tmp_path / "grid.png")


def test_features_of_any_checkpoint(pretrained, images, tmp_path, capsys):
    for tokens, shape in (("pooled", (30, 128)), ("class", (30, 128)), ("all", (30, 50, 128))):
        words = ["--resume", pretrained / "checkpoint-5.pth", "--data_path", images / "val", "--device", "cpu"]
        main_features.main(list(map(str, [*words, "--output", tmp_path / "f.npz", "--tokens", tokens])))
        with np.load(tmp_path / "f.npz") as found:
            assert found["features"].shape == shape and found["labels"].tolist() == sorted(list(range(10)) * 3)
            assert len(found["classes"]) == 10 and found["files"][0].startswith(str(found["classes"][0]))
    assert "k-NN" in capsys.readouterr().out


def test_the_scripts_see_the_images_that_training_sees(images, tmp_path):
    """Linked folders are included, hidden ones are not."""
    (tmp_path / "data" / ".thumbs").mkdir(parents=True)
    hidden = (tmp_path / "data" / ".thumbs" / "1.png", tmp_path / "data" / ".2.png")
    for file in hidden:
        file.symlink_to(next((images / "val" / "bag").iterdir()))
    for name in ("bag", "coat"):
        (tmp_path / "data" / name).symlink_to(images / "val" / name)
    found = inference.find_images([tmp_path / "data"])
    trained = splits.list_split(splits.source_at(tmp_path / "data"), "train")
    assert [str(path) for path in found] == [path for path, _ in trained] and len(found) == 6
    # A file that is named is read though hidden.
    assert inference.find_images([hidden[1], found[0]]) == [hidden[1], found[0]]


def test_of_a_sweeps_heads_the_best_one_speaks():
    torch.manual_seed(0)
    model = models_vit.MODELS["vit_demo_patch4"](img_size=28, num_classes=3)
    models_vit.make_linear_probe(model, heads=3)
    torch.nn.init.normal_(model.head[1].heads[1].weight)
    model.eval()
    imgs = torch.randn(2, 3, 28, 28)
    logits = model(imgs)
    stats = {"test_acc1_blr0.1": 40.0, "test_acc1_blr0.5": 50.0, "test_acc1_blr2": 45.0}
    models_load.keep_best_head(model, {"args": {"blr": [0.1, 0.5, 2.0]}, "stats": stats})
    assert torch.equal(model(imgs), logits[:, 1]) and model.config["probe_heads"] == 1


def test_the_best_head_of_a_sweep_is_known_after_epochs_without_evaluation(images, tmp_path, capsys):
    argv = job_argv(images, tmp_path, "--num_workers", 0, "--epochs", 4, "--eval_freq", 2, job="linprobe")
    main_linprobe.main([str(word) for word in [*argv, "--blr", 1e-6, 1]])
    checkpoint = state(tmp_path, "2")
    evaluated = {name: value for name, value in log(tmp_path)[1].items() if name.startswith("test_")}
    assert "test_acc1" not in checkpoint["stats"] and checkpoint["position"]["tested"] == evaluated
    capsys.readouterr()
    models_load.classifier(checkpoint, "checkpoint-2.pth")
    best = max(("1e-06", "1"), key=lambda blr: evaluated[f"test_acc1_blr{blr}"])
    assert f"keeping the head of --blr {best} (the best one" in capsys.readouterr().out


def test_a_sweeps_heads_are_evaluated_under_their_own_rates(images, tmp_path, capsys, refusal):
    argv = job_argv(images, tmp_path, "--num_workers", 0, "--epochs", 1, "--warmup_epochs", 0, job="linprobe")
    main_linprobe.main([str(word) for word in [*argv, "--blr", 1e-6, 1]])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blr")]
    evaluate = [*argv, "--eval", "--resume", tmp_path / "checkpoint-0.pth", "--blr"]
    main_linprobe.main([str(word) for word in [*evaluate, 1e-6, 1]])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("blr")] == said
    message = refusal(lambda: main_linprobe.main([str(word) for word in [*evaluate, 1, 1e-6]]))
    assert "checkpoint-0.pth has the heads of --blr 1e-06 1: pass these" in message


def test_predictions_bear_the_checkpoints_names(images, tmp_path):
    torch.manual_seed(0)
    model = models_vit.MODELS["vit_demo_patch4"](img_size=28, num_classes=3)
    checkpoint = {"model": model.state_dict(), "model_config": model.config, "class_to_idx": {"x": 2, "y": 0, "z": 1}}
    torch.save(checkpoint, tmp_path / "classifier.pth")
    words = ["--resume", tmp_path / "classifier.pth", "--images", images / "val", "--output", tmp_path / "p.csv"]
    main_predict.main(list(map(str, [*words, "--device", "cpu"])))
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["file", "class", "probability", "top1", "p1", "top2", "p2", "top3", "p3"] and len(rows) == 31
    for row in rows[1:]:
        assert set(row[3::2]) == {"x", "y", "z"} and row[1] == row[3]
        assert sum(map(float, row[4::2])) == pytest.approx(1, abs=2e-4) and float(row[2]) == max(map(float, row[4::2]))
    del checkpoint["class_to_idx"]
    torch.save(checkpoint, tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="no class names"):
        main_predict.main(list(map(str, [*words, "--device", "cpu"])))

    # Another program's numbers may begin with 1, or name a part of the classes only.
    for numbers in ({"x": 1, "y": 2, "z": 3}, {"x": 0, "y": 1}, {"x": 0, "y": 1, "z": 2, "v": 3}):
        torch.save({**checkpoint, "class_to_idx": numbers}, tmp_path / "classifier.pth")
        with pytest.raises(UserError, match="does not give each number from 0 to 2 to one name"):
            main_predict.main(list(map(str, [*words, "--device", "cpu"])))


def test_images_are_cut_and_turned_as_the_checkpoints_evaluation_did():
    checkpoint = {"args": {"crop_pct": 1.0, "exif": True, "mean": [0.1] * 3, "std": [0.2] * 3}}
    for given, taken in (((None, False), (1.0, True)), ((0.5, True), (0.5, True))):
        flags = argparse.Namespace(crop_pct=given[0], exif=given[1], batch_size=4, device="cpu")
        flags.max_megapixels, flags.num_workers = None, 3
        found = inference.preprocessing_as_trained(checkpoint, 3, flags)
        assert found.pixels.mean == (0.1,) * 3 and (found.crop_pct, found.pixels.exif) == taken
        assert found.num_workers == 3
        assert (flags.crop_pct, flags.exif) == given, "the flags stay as they were"


@pytest.mark.parametrize(
    ("main", "more", "message"),
    [
        (main_reconstruct, ["--device", "gpu"], "--device gpu"),
        (main_reconstruct, ["--batch_size", "0"], "--batch_size"),
        (main_reconstruct, ["--output", "grid.xyz"], "does not end in an image format that can be written"),
        (main_predict, ["--crop_pct", "-1"], "--crop_pct"),
        (main_predict, ["--crop_pct", "87.5"], "at most 1"),
        (main_reconstruct, ["--output", "grid.psd"], "does not end in an image format that can be written"),
        (main_predict, ["--output", "/tmp"], "it is a folder"),
        (main_reconstruct, ["--separate", "--output", __file__], "is a file"),
        (main_features, ["--output", "features.txt"], "must end in .npz"),
        (main_predict, ["--output", "/proc/none/p.csv"], "can't be written"),
    ],
)
def test_bad_flags_of_the_small_scripts_end_in_a_message(main, more, message, images, tmp_path):
    place = "--data_path" if main is main_features else "--images"
    output = {main_reconstruct: "g.png", main_predict: "p.csv", main_features: "f.npz"}[main]
    words = ["--resume", "nothing.pth", place, images / "val", "--output", tmp_path / output, *more]
    with pytest.raises(UserError, match=message):
        main.main(list(map(str, words)))

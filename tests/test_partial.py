"""Partial fine-tuning, attentive probes, subsets of the labels, and the confusion matrix."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine_finetune
import main_finetune
import main_linprobe
import models_load
import models_vit
from util.amp import LossScaler
from util.data import loaders, transforms
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.errors import UserError
from util.report.scores import Evaluation

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
SMALL = (
    "--input_size 28 --patch_size 7 --batch_size 16 --epochs 1 --warmup_epochs 0 --amp off --device cpu "
    "--num_workers 0 --nb_classes 10 --model vit_demo_patch4"
)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (0, []),
        (0.5, ["blocks.2.mlp", "blocks.2.norm2", "norm"]),
        (1, ["blocks.2", "norm"]),
        (1.5, ["blocks.1.mlp", "blocks.1.norm2", "blocks.2", "norm"]),
        (3, ["blocks.0", "blocks.1", "blocks.2", "norm"]),
    ],
)
def test_exactly_the_named_parameters_are_trained(blocks, expected, pooled):
    model = models_vit.freeze_all_but_last(models_vit.VisionTransformer(**SIZE, global_pool=pooled), blocks)
    wanted = tuple(f"{name}." for name in [*expected, "head", "fc_norm"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(wanted), name


def test_without_the_flag_everything_is_trained(images, tmp_path):
    words = [*SMALL.split(), "--data_path", str(images), "--output_dir", str(tmp_path / "a")]
    main_finetune.main(words)
    main_finetune.main([*words[:-1], str(tmp_path / "b"), "--trainable_blocks", "1"])
    full, part = (json.loads((tmp_path / run / "log.txt").read_text())["n_parameters"] for run in "ab")
    model = models_vit.MODELS["vit_demo_patch4"](img_size=28, patch_size=7, num_classes=10)
    assert full == sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = sum(p.numel() for module in (model.blocks[-1], model.head, model.fc_norm) for p in module.parameters())
    assert part == count


def test_an_attentive_probe_trains_its_query_and_its_head_only():
    model = models_vit.make_linear_probe(models_vit.VisionTransformer(**SIZE, global_pool=False), attentive=True)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"attn_pool", "head"}
    imgs = torch.randn(4, 3, 16, 16)
    model.train()(imgs).sum().backward()
    assert model.attn_pool.latent.grad is not None and model.blocks[0].mlp.fc1.weight.grad is None
    tokens = torch.randn(4, 17, 16)
    moved = tokens.clone()
    moved[:, 0] += 5
    assert torch.equal(model.pool(tokens), model.pool(moved)), "it attends to the patch tokens alone"
    rebuilt = models_load.classifier_from_config(model.config)
    rebuilt.load_state_dict(model.state_dict())


def test_a_pooled_probe_does_not_depend_on_the_untrained_norm():
    """Pre-training has no fc_norm; its scale and bias do not matter, since the BatchNorm that follows removes them."""
    torch.manual_seed(0)
    model = models_vit.make_linear_probe(models_vit.VisionTransformer(**SIZE, global_pool=True)).train()
    imgs = torch.randn(32, 3, 16, 16)
    plain = model(imgs)
    torch.nn.init.uniform_(model.fc_norm.weight, 0.5, 2.0)
    torch.nn.init.normal_(model.fc_norm.bias)
    assert torch.allclose(model(imgs), plain, atol=1e-4)


def test_an_attentive_probe_runs_and_resumes(images, tmp_path):
    words = [*SMALL.split(), "--data_path", str(images), "--output_dir", str(tmp_path), "--probe", "attentive"]
    main_linprobe.main(words)
    main_linprobe.main([*words, "--epochs", "2", "--resume", "auto", "--resume_override"])
    main_linprobe.main([*words, "--eval", "--resume", str(tmp_path / "checkpoint-1.pth")])
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(("fraction", "per_class"), [(0.5, 4), (0.25, 2), (0.01, 1)])
def test_a_fraction_of_the_labels_is_balanced_and_seeded(fraction, per_class, images):
    def chosen_images(seed):
        loader = loaders.train_loader(
            DataSpec(str(images)),
            transforms.Crop(28, (1.0, 1.0)),
            PixelSpec(),
            loaders.Loading(5, 0, False, seed, torch.device("cpu")),
            fraction=fraction,
        )
        dataset = loader.dataset
        assert len(dataset) == 10 * per_class == len(loader) * 5
        assert torch.cat([targets for _, targets in loader]).bincount().tolist() == [per_class] * 10
        return dataset.chosen.tolist()

    assert chosen_images(0) == chosen_images(0) != chosen_images(1)


def test_the_confusion_matrix_counts_every_image(images, tmp_path, capsys):
    words = [*SMALL.split(), "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    main_finetune.main([*words, "--confusion", str(tmp_path / "tables" / "confusion.csv")])
    accuracy = json.loads((tmp_path / "run/log.txt").read_text())["test_acc1"]
    with (tmp_path / "tables" / "confusion.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["class", *(row[0] for row in rows), "accuracy"] and len(rows) == 10
    assert all(sum(map(int, row[1:-1])) == 3 for row in rows)
    assert sum(int(row[1 + n]) for n, row in enumerate(rows)) / 30 * 100 == pytest.approx(accuracy)


def test_the_ema_is_saved_resumed_and_evaluated(images, tmp_path):
    """The EMA differs from the weights, and is the same at the end of a run that was interrupted after an epoch."""
    words = [*SMALL.split(), "--data_path", str(images), "--model_ema", "--model_ema_decay", "0.5", "--drop_path", "0"]
    two = ["--epochs", "2", "--resume", "auto", "--output_dir"]
    main_finetune.main([*words, *two, str(tmp_path / "whole")])
    first = torch.load(tmp_path / "whole/checkpoint-0.pth", weights_only=True)
    last = torch.load(tmp_path / "whole/checkpoint-1.pth", weights_only=True)
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(last["model"][name], last["model_ema"][name])
    assert (last["model"][name] - last["model_ema"][name]).norm() < (last["model"][name] - first["model"][name]).norm()
    (tmp_path / "part").mkdir()
    torch.save(first, tmp_path / "part/checkpoint-0.pth")
    main_finetune.main([*words, *two, str(tmp_path / "part")])
    again = torch.load(tmp_path / "part/checkpoint-1.pth", weights_only=True)
    assert all(torch.equal(value, again["model_ema"][key]) for key, value in last["model_ema"].items())
    line = json.loads((tmp_path / "whole/log.txt").read_text().splitlines()[-1])
    assert 0 <= line["test_ema_acc1"] <= 100
    main_finetune.main([*words, "--eval", "--resume", str(tmp_path / "whole/checkpoint-1.pth")])


class TwoHeads(torch.nn.Module):
    """Model for images whose pixels are their class; its first head is always wrong, the second always right."""

    def forward(self, imgs):
        right = torch.nn.functional.one_hot(imgs[:, 0, 0, 0].long(), 3).float()
        return torch.stack([right.roll(1, dims=1), right], dim=1)


def test_of_several_heads_the_confusion_matrix_is_the_best_ones(tmp_path):
    class Loader(list):
        dataset = SimpleNamespace(classes=["a", "b", "c"])

    targets = torch.tensor([0, 1, 2, 2])
    batches = Loader([(targets.float()[:, None, None, None], targets)])
    stats = engine_finetune.evaluate(
        TwoHeads(),
        batches,
        torch.device("cpu"),
        LossScaler("off", torch.device("cpu")),
        Evaluation(head_names=["low", "high"], confusion=str(tmp_path / "confusion.csv")),
    )
    assert stats["acc1"] == 100 and stats["acc1_low"] == 0
    assert (tmp_path / "confusion.csv").read_text().split() == [
        "class,a,b,c,accuracy",
        "a,1,0,0,100.00",
        "b,0,1,0,100.00",
        "c,0,0,2,100.00",
    ]


def test_a_class_without_images_has_no_accuracy_in_the_confusion_matrix(tmp_path):
    file = tmp_path / "confusion.csv"
    engine_finetune.write_confusion(file, torch.tensor([[3, 1], [0, 0]]), ["a", "absent"])
    assert file.read_text().split() == ["class,a,absent,accuracy", "a,3,1,75.00", "absent,0,0,"]


def test_requests_to_stop_are_looked_for_while_the_ema_is_evaluated_too(capsys):
    class Loader(list):
        dataset, device = None, torch.device("cpu")

    batches = Loader([(torch.eye(2), torch.tensor([0, 1]))] * 3)
    polls, ema = [], SimpleNamespace(module=torch.nn.Identity())
    scaler = LossScaler("off", Loader.device)
    stats = main_finetune.evaluate_both(
        torch.nn.Identity(), ema, batches, scaler, Evaluation(), lambda: polls.append(1)
    )
    assert stats["acc1"] == stats["ema_acc1"] == 100 and len(polls) == 6
    assert re.findall(r"^(\*|the EMA)", capsys.readouterr().out, re.M) == ["*", "the EMA", "*"]


def test_a_confusion_matrix_that_cannot_be_written_is_an_error_that_keeps_what_was_trained():
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        engine_finetune.write_confusion(Path("/dev/full"), torch.zeros(2, 2), ["a", "b"])


def test_a_run_too_short_for_its_ema_is_warned_of(capsys):
    model = torch.nn.Linear(2, 2)
    main_finetune.build_ema(model, 0.9999, 1950)
    assert "82% of the EMA is still the first weights after all 1950" in capsys.readouterr().out
    main_finetune.build_ema(model, 1 - 10 / 1950, 1950)
    assert capsys.readouterr().out == ""

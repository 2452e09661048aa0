"""Properties that hold for every size, name and rate, on examples that hypothesis draws."""

import argparse
import csv
import json
import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import engine_finetune
import main_export
import models_mae
from util import masking
from util.data import loaders
from util.distributed import dist
from util.lr_sched import CosineSchedule
from util.pos_embed import resize_pos_embed, sincos_pos_embed

# Derandomised: the same examples in every run, so that a failure is of this change.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

CPU = torch.device("cpu")
sides = st.integers(1, 7)

# Any name that a folder can have, mostly made of what means something in a file format, or is not UTF-8.
special = [*"|\\\n\r,;\"'`#:-{}<>* .", "\r\n", "---", "é", os.fsdecode(b"\x80"), os.fsdecode(b"\xff")]
pieces = st.sampled_from(special) | st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=3
)
folder_names = st.lists(pieces, min_size=1, max_size=5).map("".join)


def grid_model(grid, patch, channels):
    """Autoencoder of a grid of patches, as small as can be."""
    size = (grid[0] * patch, grid[1] * patch)
    return models_mae.MaskedAutoencoderViT(size, patch, channels, 4, 1, 1, 4, 1, 1)


@given(h=sides, w=sides, patch=st.integers(1, 5), channels=st.integers(1, 6))
@settings(max_examples=60)
def test_patches_are_cut_row_by_row_and_joined_again(h, w, patch, channels):
    model = grid_model((h, w), patch, channels)
    imgs = torch.arange(2 * channels * h * w * patch**2).view(2, channels, h * patch, w * patch)
    patches = model.patchify(imgs)
    assert patches.shape == (2, h * w, patch * patch * channels)
    assert torch.equal(model.unpatchify(patches), imgs)
    row, column = h - 1, w // 2
    corner = imgs[1, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert torch.equal(patches[1, row * w + column], corner.permute(1, 2, 0).flatten())  # channels last


@given(h=sides, w=sides, ratio=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(masking.KINDS), N=sides)
def test_masks_keep_exactly_k_of_l(h, w, ratio, kind, N):
    kept = masking.num_visible(h * w, ratio)
    assert kept == int(h * w * (1 - ratio))
    model, x = grid_model((h, w), 1, 1), torch.arange(h * w).expand(N, -1)[..., None]
    visible, mask, ids_restore = model.random_masking(x, ratio, masking.noise(kind, N, (h, w), CPU))
    assert visible.shape == (N, kept, 1) and (mask.sum(dim=1) == h * w - kept).all()
    for image in range(N):
        assert sorted(visible[image].flatten().tolist()) == (mask[image] == 0).nonzero().flatten().tolist()
        assert sorted(ids_restore[image].tolist()) == list(range(h * w))


@given(h=sides, w=sides, quarter=st.integers(1, 16))
def test_positions_of_a_transposed_grid_are_transposed(h, w, quarter):
    """Rows and columns change places, and with them the halves of the channels."""
    dim = 4 * quarter
    table, other = sincos_pos_embed(dim, (h, w))[0], sincos_pos_embed(dim, (w, h))[0]
    grid = table[1:].view(h, w, dim).roll(dim // 2, dims=2).transpose(0, 1)
    assert torch.equal(grid.reshape(-1, dim), other[1:]) and not table[0].any()
    if h * w > 1:
        assert len(table[1:].unique(dim=0)) == h * w, "two places have one position"


@given(h=sides, w=sides, H=sides, W=sides)
def test_resized_positions(h, w, H, W):
    """The class token's row stays; transposing commutes with resizing; a constant stays; the same grid is the same."""
    torch.manual_seed(h * 1000 + w * 100 + H * 10 + W)
    table = torch.randn(1, 1 + h * w, 8)
    resized = resize_pos_embed(table, (h, w), (H, W))
    assert resized.shape == (1, 1 + H * W, 8) and torch.equal(resized[:, 0], table[:, 0])

    def transposed(table, rows, columns):
        grid = table[:, 1:].view(1, rows, columns, 8).transpose(1, 2).reshape(1, -1, 8)
        return torch.cat([table[:, :1], grid], dim=1)

    other = resize_pos_embed(transposed(table, h, w), (w, h), (W, H))
    assert torch.allclose(other, transposed(resized, H, W), atol=1e-5)
    assert torch.allclose(resize_pos_embed(torch.ones_like(table), (h, w), (H, W)), torch.ones(1), atol=1e-5)
    assert torch.equal(resize_pos_embed(table, (h, w), (h, w)), table)


def share(images, batch_size, seed, epoch, world, rank, first_step=0):
    """Return the batches of a rank in an epoch."""
    before = dist.world_size, dist.rank
    dist.world_size, dist.rank = lambda: world, lambda: rank
    try:
        sampler = loaders.EpochSampler(images, batch_size, seed)
        sampler.set_epoch(epoch, first_step)
        indices = [index for _, index in sampler]
    finally:
        dist.world_size, dist.rank = before
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


@given(
    images=st.integers(1, 200),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 6),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_ranks_together_see_each_image_once_for_any_number_of_them(images, batch_size, world, epoch, seed):
    shares = [share(images, batch_size, seed, epoch, world, rank) for rank in range(world)]
    steps = images // (batch_size * world)
    assert all(len(batches) == steps and all(len(b) == batch_size for b in batches) for batches in shares)
    seen = [index for batches in shares for batch in batches for index in batch]
    assert len(set(seen)) == len(seen) == steps * batch_size * world and set(seen) <= set(range(images))

    # One process with the whole batch sees the same images at each step.
    alone = share(images, batch_size * world, seed, epoch, 1, 0)
    for step in range(steps):
        assert sorted(index for batches in shares for index in batches[step]) == sorted(alone[step])

    # A resumed epoch goes on where it was left.
    for first_step in {0, steps // 2, steps}:
        assert share(images, batch_size, seed, epoch, world, world - 1, first_step) == shares[-1][first_step:]


@given(
    lr=st.floats(1e-6, 10),
    share_of_min=st.floats(0, 1),
    warmup=st.floats(0, 50),
    more=st.floats(0.1, 800),
)
@example(lr=1.0, share_of_min=0.0, warmup=0.0, more=1.0)
def test_the_learning_rate_rises_then_falls_without_a_jump(lr, share_of_min, warmup, more):
    min_lr = lr * share_of_min
    schedule = CosineSchedule(lr, min_lr, warmup, warmup + more)
    epochs = np.linspace(0, warmup + more, 400)
    rates = np.array([schedule.at(epoch) for epoch in epochs])
    rising = epochs <= warmup
    slack = 1e-9 * lr
    assert (np.diff(rates[rising]) >= -slack).all() and (np.diff(rates[~rising]) <= slack).all()
    assert -slack <= rates.min() and rates.max() <= lr + slack
    assert math.isclose(schedule.at(warmup + more), min_lr, abs_tol=slack)
    assert math.isclose(schedule.at(warmup), lr)
    assert schedule.at(0) == (0 if warmup else lr)

    # No step is longer than the steepest part of either half allows.
    steepest = max(lr / warmup if warmup > 0 else 0, (lr - min_lr) * math.pi / 2 / more)
    if warmup > 0:
        assert np.abs(np.diff(rates)).max() <= steepest * (epochs[1] - epochs[0]) + slack


@given(names=st.lists(folder_names, min_size=1, max_size=4, unique=True))
@settings(max_examples=60)
def test_a_confusion_matrix_has_every_class_under_its_name(names, tmp_path):
    table = torch.arange(len(names) ** 2).view(len(names), -1)
    engine_finetune.write_confusion(tmp_path / "confusion.csv", table, names)
    with (tmp_path / "confusion.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = csv.reader(file)
    assert head == ["class", *names, "accuracy"] and [row[0] for row in rows] == names
    assert [[int(count) for count in row[1:-1]] for row in rows] == table.tolist()


@given(names=st.lists(folder_names, min_size=1, max_size=3, unique=True), data=folder_names)
@settings(max_examples=40)
def test_exports_keep_any_class_name_and_their_card_its_table(names, data, tmp_path):
    """config.json gives the names back; the card's front matter and rows stay what they are."""
    assume(data.strip(". ") == data)
    config = {"embed_dim": 8} | dict.fromkeys(main_export.configurations.ENCODER_ARGUMENTS, 8) | {"in_chans": 3}
    description = main_export.configurations.timm_config(config, main_export.PixelSpec(), 0.875, names)
    main_export.write_json(tmp_path / "config.json", description)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["label_names"] == names

    checkpoint = {"epoch": 3, "job": "finetune", "stats": {"test_acc1": 50.0}}
    flags = {"data_path": f"/x/{data}", "epochs": 4}
    source = main_export.Source("file.pth", checkpoint, None, flags, main_export.PixelSpec(), 0.875, names)
    text = main_export.card(source, argparse.Namespace(to="timm", license="apache-2.0", model_ema=False))
    lines = text.encode("utf-8", errors="backslashreplace").decode().split("\n")
    assert lines[0] == "---" and lines[4] == "---" and lines[1] == "license: apache-2.0"
    rows = [line for line in lines if line.startswith("|")]
    assert all(row.replace("\\\\", "").replace("\\|", "").count("|") == 3 for row in rows)
    assert f"| classes | {len(names)} |" in rows and "| test_acc1 | 50 |" in rows

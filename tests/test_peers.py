"""Other implementations as judges: torchvision, transformers, timm's demands on optimisers, lightly if installed."""

import copy
import os
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import SAMPLES
from PIL import Image
from scipy import stats
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import RandomResizedCrop

import main_export
import models_mae
from util import masking
from util.data import datasets
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import random_box
from util.lars import LARS

ODD_NAMES = ["a b", "ä", "A", "a", "0", "10", "9", "_x", "z.y", "-", "日本", os.fsdecode(b"\xe9")]


@pytest.mark.parametrize("shape", [(300, 500), (400, 90), (32, 32)])
def test_crops_are_distributed_as_torchvisions(shape):
    """Kolmogorov and Smirnov on area, aspect and place; a wrong scale or aspect gives a p-value below 1e-10."""
    random.seed(0)
    ours = np.array([random_box(*shape, (0.2, 1.0), False) for _ in range(4000)]).T
    torch.manual_seed(0)
    image = torch.empty(1, *shape)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]).T
    for name, value in (
        ("area", lambda top, left, height, width: height * width),
        ("aspect", lambda top, left, height, width: width / height),
        ("top", lambda top, left, height, width: top),
        ("left", lambda top, left, height, width: left),
    ):
        assert stats.ks_2samp(value(*ours), value(*theirs)).pvalue > 1e-3, name


def test_folders_of_any_name_are_numbered_as_torchvisions(tmp_path):
    file = next((SAMPLES / "val" / "bag").iterdir())
    for name in ODD_NAMES:
        for place in (name, f"{name}/inner"):
            (tmp_path / "train" / place).mkdir(parents=True)
            (tmp_path / "train" / place / f"{name}.png").write_bytes(file.read_bytes())
    ours = datasets.open_split(datasets.Images, DataSpec(str(tmp_path)), "train", None, PixelSpec())
    theirs = torchvision_datasets.ImageFolder(tmp_path / "train")
    assert ours.classes == theirs.classes and ours.class_to_idx == theirs.class_to_idx
    assert sorted((str(path), target) for path, target in ours.samples) == sorted(theirs.samples)


@pytest.mark.parametrize("side", [16, 40, 72])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_transformers_computes_the_same_at_odd_sizes(side, norm_pix, tmp_path):
    """ViTMAE with 4, 25 and 81 patches: loss, masks, predictions, and gradients that went through every layer."""
    torch.manual_seed(side)
    model = models_mae.MaskedAutoencoderViT(side, 8, 3, 24, 2, 3, 16, 1, 2, norm_pix_loss=norm_pix)
    config = model.config | {"model": "mae_vit_tiny_patch16"}
    torch.save({"model": model.state_dict(), "model_config": config}, tmp_path / "m.pth")
    main_export.main(["--resume", str(tmp_path / "m.pth"), "--to", "hf", "--output", str(tmp_path / "hf")])
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").train()

    imgs, noise = torch.randn(3, 3, side, side), torch.rand(3, (side // 8) ** 2)
    loss, pred, mask = model(imgs, 0.75, noise)
    expected = theirs(imgs, noise=noise)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.equal(mask, expected.mask) and torch.allclose(pred, expected.logits, atol=1e-5)

    loss.backward()
    expected.loss.backward()
    for ours, other in (
        (model.cls_token, theirs.vit.embeddings.cls_token),
        (model.patch_embed.proj.weight, theirs.vit.embeddings.patch_embeddings.projection.weight),
        (model.mask_token, theirs.decoder.mask_token),
        (model.decoder_pred.weight, theirs.decoder.decoder_pred.weight),
    ):
        assert torch.allclose(ours.grad, other.grad, atol=1e-5 * ours.grad.abs().max())


# What timm asks of its optimisers.


def rosenbrock(point):
    x, y = point[0]
    return (1 - x) ** 2 + 1 * (y - x**2) ** 2


def test_lars_goes_downhill():
    """Rosenbrock's valley, as a matrix of one row: the trust ratio alone sets the length of the steps."""
    point = torch.nn.Parameter(torch.tensor([[1.5, 1.5]]))
    optimizer = LARS([point], lr=5.0, momentum=0.5)
    start = rosenbrock(point).item()
    for _ in range(300):
        optimizer.zero_grad()
        rosenbrock(point).backward()
        optimizer.step()
    assert rosenbrock(point).item() < 0.05 * start


def test_lars_takes_a_closure_and_returns_its_loss():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4 and weight[0, 0] < 1
    assert optimizer.step() is None


def test_lars_goes_on_from_its_state():
    """A copy made after three steps takes the same steps from there."""
    torch.manual_seed(0)
    first = torch.nn.Linear(4, 3)
    optimizer = LARS(first.parameters(), lr=0.5, weight_decay=0.1)

    def steps(model, optimizer, count, seed):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(5, 4, generator=draw)).square().mean().backward()
            optimizer.step()

    steps(first, optimizer, 3, seed=1)
    second = torch.nn.Linear(4, 3)
    second.load_state_dict(first.state_dict())
    again = LARS(second.parameters(), lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(first, optimizer, 3, seed=2)
    steps(second, again, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_lars_keeps_groups_apart_and_passes_over_what_has_no_gradient():
    a, b, c = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = LARS([{"params": [a]}, {"params": [b, c], "lr": 0.0}], lr=1.0)
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert (a < 1).all() and (b == 1).all() and (c == 1).all()
    assert c not in optimizer.state


# lightly, which requirements-dev.txt leaves out: it brings Lightning and Hydra along.


@pytest.mark.parametrize("patch", [2, 4])
def test_lightly_cuts_the_same_patches(patch):
    utils = pytest.importorskip("lightly.models.utils")
    model = models_mae.MaskedAutoencoderViT(12, patch, 3, 8, 1, 1, 8, 1, 1)
    imgs = torch.randn(2, 3, 12, 12)
    assert torch.equal(model.patchify(imgs), utils.patchify(imgs, patch))
    assert torch.equal(model.unpatchify(model.patchify(imgs)), utils.unpatchify(utils.patchify(imgs, patch), patch))


def test_lightly_has_the_same_positions_and_decoder():
    """The decoder's prediction from tokens that are all there."""
    module = pytest.importorskip("lightly.models.modules.masked_autoencoder_timm")
    if not hasattr(module, "MAEDecoderTIMM"):
        pytest.skip("lightly 1.7 has no MAEDecoderTIMM")
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(24, 4, 3, 24, 1, 3, 16, 2, 2)
    theirs = module.MAEDecoderTIMM(36, 4, 3, 24, 16, 2, 2)
    assert torch.allclose(theirs.decoder_pos_embed, model.decoder_pos_embed, atol=1e-6)
    ours = {name: value for name, value in model.state_dict().items() if "decoder" in name or name == "mask_token"}
    theirs.load_state_dict(ours)
    tokens, order = torch.randn(2, 37, 24), torch.arange(36).expand(2, -1)
    assert torch.allclose(theirs(tokens)[:, 1:], model.forward_decoder(tokens, order), atol=1e-5)


def test_lightly_keeps_as_many_patches():
    utils = pytest.importorskip("lightly.models.utils")
    for patches, ratio in ((196, 0.75), (64, 0.6), (49, 0.75), (256, 0.9)):
        kept, _ = utils.random_token_mask((1, 1 + patches), ratio)
        assert kept.shape[1] - 1 == masking.num_visible(patches, ratio)


def test_images_are_decoded_as_torchvisions_loader_does(tmp_path):
    """A picture without losses, in the modes that both take."""
    draw = np.random.default_rng(0)
    for mode in ("RGB", "L", "P"):
        picture = Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).convert(mode)
        (tmp_path / mode / "train" / "a").mkdir(parents=True)
        picture.save(tmp_path / mode / "train" / "a" / "x.png")
        ours = datasets.open_split(datasets.Images, DataSpec(str(tmp_path / mode)), "train", None, PixelSpec())
        theirs = torchvision_datasets.ImageFolder(tmp_path / mode / "train")
        assert np.array_equal(ours[0][0], np.asarray(theirs[0][0])), mode

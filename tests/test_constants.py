"""Constants that the paper or its published code fixes: initial values, epsilons, momenta, margins, temperatures."""

import math
from inspect import signature

import numpy as np
import pytest
import torch
from torch import nn

import engine_finetune
import main_finetune
import main_linprobe
import models_mae
import models_vit
from util import masking, optim
from util.amp import LossScaler
from util.data.images import PixelSpec
from util.data.transforms import CentreCrop
from util.lr_sched import CosineSchedule
from util.report import knn, pictures

CPU = torch.device("cpu")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def autoencoder(**more):
    return models_mae.MaskedAutoencoderViT(**SMALL, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4, **more)


def classifier_args(job, *more):
    return job.get_args(["--model", "vit_tiny_patch16", "--input_size", "32", "--nb_classes", "1000", *more])


@pytest.mark.parametrize("pool", ["--global_pool", "--cls_token"])
def test_a_fine_tuned_head_starts_near_zero(pool, tmp_path):
    """Standard deviation 2e-5 after a pre-trained encoder, and a zero bias: the first logits say nothing."""
    torch.save({"model": models_mae.mae_vit_tiny_patch16(img_size=32).state_dict()}, tmp_path / "mae.pth")
    args = classifier_args(main_finetune, pool, "--finetune", str(tmp_path / "mae.pth"))
    head = main_finetune.build_model(args, pretrained=True).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and not head.bias.any()


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probes_head_starts_at_the_published_scale(probe):
    """Standard deviation 0.01, a BatchNorm without affine with eps 1e-6 and torch's momentum of 0.1."""
    args = classifier_args(main_linprobe, "--probe", probe, "--global_pool")
    norm, head = main_linprobe.build_model(args, [0.1], pretrained=False).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02) and not head.bias.any()
    assert (norm.eps, norm.momentum, norm.affine) == (1e-6, 0.1, False)


def test_a_sweeps_heads_start_alike():
    model = main_linprobe.build_model(classifier_args(main_linprobe), [0.1, 1.0, 10.0], pretrained=False)
    first, *others = [head.weight for head in model.head[1].heads]
    assert all(torch.equal(first, other) for other in others) and len(others) == 2


def test_an_autoencoders_initial_values():
    """Xavier's bounds for every matrix, the patch projection as one; tokens with a standard deviation of 0.02."""
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(**SMALL | {"embed_dim": 256}, decoder_embed_dim=256, decoder_depth=1)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2) and abs(token.mean()) < 0.006


def test_models_without_arguments_are_the_published_ones():
    """An autoencoder of ViT-L with a decoder of 8 blocks, 512 wide, 16 heads; a classifier of ViT-B."""
    autoencoder, classifier = (
        {name: parameter.default for name, parameter in signature(constructor).parameters.items()}
        for constructor in (models_mae.MaskedAutoencoderViT, models_vit.VisionTransformer)
    )
    both = {"img_size": 224, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0}
    large, base = ({"embed_dim": d, "depth": b, "num_heads": h} for d, b, h in ((1024, 24, 16), (768, 12, 12)))
    decoder = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    assert autoencoder == both | large | decoder | {"norm_pix_loss": False}
    assert classifier == both | base | {"num_classes": 1000, "global_pool": True, "drop_path_rate": 0.0}


def test_every_layer_norm_has_the_published_epsilon():
    models = [
        autoencoder(),
        *(models_vit.VisionTransformer(**SMALL, global_pool=pool) for pool in (True, False)),
    ]
    norms = [module for model in models for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 8 + 2 * 5 and {norm.eps for norm in norms} == {1e-6}


def test_normalised_pixels_have_the_published_epsilon_and_the_unbiased_variance():
    """Patches so flat that an epsilon of 1e-6 matters: targets, and pictures made from them."""
    model = autoencoder(norm_pix_loss=True)
    imgs = 0.5 + 1e-3 * torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = model.patchify(imgs)
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True, unbiased=True)
    assert 0.5e-6 < variance.mean() < 2e-6
    expected = (patches - mean) / torch.sqrt(variance + 1e-6)
    assert torch.allclose(model.target(imgs), expected, rtol=1e-9)
    assert torch.equal(autoencoder().target(imgs), patches)


def test_pictures_undo_the_normalisation():
    """A perfect prediction of normalised pixels gives the image back, flat patches too."""
    model = autoencoder(norm_pix_loss=True)
    imgs = 0.5 + 1e-3 * torch.randn(2, 3, 32, 32, dtype=torch.float64)
    still = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    shown = pictures.panels(model, imgs, model.target(imgs), torch.ones(2, 16), *still)
    assert torch.allclose(shown[:, 2], imgs, atol=1e-7)


@pytest.mark.parametrize(("job", "betas", "decay"), [("pretrain", (0.9, 0.95), 0.05), ("finetune", (0.9, 0.999), 0.05)])
def test_adamws_constants(job, betas, decay):
    if job == "pretrain":
        optimizer = optim.pretrain_optimizer(autoencoder(), 1e-3, decay)
    else:
        model = models_vit.VisionTransformer(**SMALL, num_classes=3)
        optimizer = optim.finetune_optimizer(model, 1e-3, decay, 0.75)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == (betas, 1e-8, False)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, decay}


@pytest.mark.parametrize("ranks", [1, 2])
def test_adamw_is_fused_with_and_without_sharding(ranks, monkeypatch):
    monkeypatch.setattr(optim.dist, "world_size", lambda: ranks)
    monkeypatch.setattr(optim, "ZeroRedundancyOptimizer", lambda groups, kind, **more: kind(groups, **more))
    optimizer = optim.adamw([{"params": list(nn.Linear(2, 2).parameters())}], 1e-3, shard=True)
    assert all(group["fused"] for group in optimizer.param_groups)


def test_larss_constants():
    model = models_vit.make_linear_probe(models_vit.VisionTransformer(**SMALL, num_classes=3))
    optimizer = optim.probe_optimizer(model, [0.1], 0.0)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["trust_coefficient"], group["weight_decay"]) == (0.9, 0.001, 0.0)
    rates = optim.probe_optimizer(
        models_vit.make_linear_probe(models_vit.VisionTransformer(**SMALL, num_classes=3), heads=2), [0.1, 0.4], 0.0
    )
    assert [group["lr_scale"] for group in rates.param_groups] == [1.0, 4.0]


def test_the_scaled_learning_rate_is_per_256_images(monkeypatch):
    monkeypatch.setattr(optim.dist, "world_size", lambda: 8)
    assert optim.actual_lr(None, 1.5e-4, 64, 8) == pytest.approx(1.5e-4 * 4096 / 256)
    assert optim.actual_lr(0.3, 1.5e-4, 64, 8) == 0.3


def test_warm_up_starts_at_zero_and_the_cosine_ends_at_the_minimum():
    schedule = CosineSchedule(lr=1.0, min_lr=0.1, warmup_epochs=4, epochs=12)
    rates = [schedule.at(epoch) for epoch in (0, 1, 2, 4, 8, 12)]
    assert rates == pytest.approx([0, 0.25, 0.5, 1.0, 0.55, 0.1])


def test_images_are_normalised_and_cropped_as_imagenets():
    pixels = PixelSpec()
    assert pixels.mean == pytest.approx((0.485, 0.456, 0.406)) and pixels.std == pytest.approx((0.229, 0.224, 0.225))
    assert PixelSpec.from_args({}, 4) == PixelSpec(4, (0, 0, 0, 0), (1, 1, 1, 1))
    # The short side becomes 224 / (224/256) = 256; above 224 there is no margin.
    img = np.zeros((300, 512, 3), np.uint8)
    for size, margin in ((224, 224 / 256), (256, 1.0)):
        crop = CentreCrop(size)
        assert crop.cover == (size / margin, size / margin) and crop(img).shape == (3, size, size)


def test_nearest_neighbours_are_20_with_a_temperature_of_a_fourteenth():
    """Twenty neighbours vote, each by exp(cosine / 0.07): the 21st does not, and nearness counts."""
    assert (knn.K, knn.TEMPERATURE) == (20, 0.07)
    # 21 examples of class 0 at a cosine of 0.5, of which 19 vote beside one of class 1 with a cosine of x.
    for x, expected in ((0.5 + 0.07 * math.log(19) + 0.01, 1), (0.5 + 0.07 * math.log(19) - 0.01, 0)):
        angles = [math.acos(0.5)] * 21 + [math.acos(x)]
        train = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
        targets = torch.tensor([0] * 21 + [1])
        assert knn.accuracy(train, targets, torch.tensor([[1.0, 0.0]]), torch.tensor([expected])) == 100


def test_blocks_cover_a_tenth_to_three_tenths_with_an_aspect_up_to_a_third():
    """Measured on a grid so fine that rounding does not matter: the first rectangle of each image."""
    torch.manual_seed(0)
    side, rows = 200, torch.arange(200)
    number = masking._first_block(300, rows, rows, torch.float32, None).view(300, side, side)
    first = number == 0
    height, width = first.any(dim=2).sum(dim=1), first.any(dim=1).sum(dim=1)
    area, aspect = height * width / side**2, width / height
    inside = (height < side) & (width < side)  # longer sides are cut
    assert 0.095 < area[inside].min() < 0.11 and 0.28 < area[inside].max() < 0.305
    assert aspect[inside].log().abs().max() < math.log(1 / 0.3) + 0.02
    assert aspect[inside].max() > 2.5 and aspect[inside].min() < 0.4
    assert number.max() <= 24


@pytest.mark.parametrize("classes", [10, 5, 3])
def test_top_5_counts_five(classes):
    """Of image i the true class is the i-th best: right in top-1 is the first image, in top-5 the first five."""
    logits = torch.stack([torch.arange(classes).roll(-place).neg().float() for place in range(classes)])
    true = logits.argsort(dim=1, descending=True)[range(classes), range(classes)]
    stats = engine_finetune.evaluate(nn.Identity(), [(logits, true)], CPU, LossScaler("off", CPU))
    assert stats["acc1"] == pytest.approx(100 / classes)
    assert stats["acc5"] == pytest.approx(100 * min(5, classes) / classes)

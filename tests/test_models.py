"""Models: masks, other shapes, initial weights and sizes, which the golden data of one shape cannot show."""

import pytest
import torch

import models_mae
import models_vit

SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def test_each_mask_keeps_exactly_the_patches_of_smallest_noise_in_order():
    model = models_mae.MaskedAutoencoderViT(img_size=16, **SMALL, **DECODER)
    x, noise = torch.randn(5, 16, 3), torch.rand(5, 16)
    for ratio in (0.75, 0.6, 0.1):
        visible, mask, ids_restore = model.random_masking(x, ratio, noise)
        keep = int(16 * (1 - ratio))
        order = noise.sort(dim=1).indices
        for i in range(5):
            assert torch.equal(visible[i], x[i, order[i, :keep]])
            assert set(mask[i].nonzero().flatten().tolist()) == set(order[i, keep:].tolist())
            assert torch.equal(order[i][ids_restore[i]], torch.arange(16))


def test_masks_differ_between_images_and_calls():
    model = models_mae.MaskedAutoencoderViT(img_size=16, **SMALL, **DECODER)
    first, second = (model.random_masking(torch.zeros(8, 16, 1), 0.5)[1] for _ in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_loss_ignores_visible_patches():
    model = models_mae.MaskedAutoencoderViT(img_size=16, **SMALL, **DECODER)
    imgs, mask = torch.randn(2, 3, 16, 16), torch.zeros(2, 16)
    mask[:, 3:] = 1
    pred = model.patchify(imgs)
    spoiled = pred + 5 * (1 - mask[..., None])
    assert model.forward_loss(imgs, spoiled, mask) == 0
    assert model.forward_loss(imgs, pred + 2 * mask[..., None], mask) == pytest.approx(4, rel=1e-5)


def test_oblong_images_and_other_channels():
    model = models_mae.MaskedAutoencoderViT(img_size=(8, 16), in_chans=2, **SMALL, **DECODER)
    imgs = torch.randn(3, 2, 8, 16)
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)
    loss, pred, mask = model(imgs, mask_ratio=0.5)
    assert loss.isfinite() and pred.shape == (3, 8, 32) and mask.sum(dim=1).tolist() == [4, 4, 4]


def test_initial_weights_are_the_papers():
    model = models_mae.mae_vit_tiny_patch16()
    assert 0.015 < model.mask_token.std() < 0.025 and 0.015 < model.cls_token.std() < 0.025
    weight = model.patch_embed.proj.weight.flatten(1)
    bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    assert model.pos_embed[0, 0].abs().max() == 0 and model.pos_embed[0, 1:].abs().max() > 0.9
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("name", "encoder_millions"),
    [("base_patch16", 85.8), ("large_patch16", 303.3), ("huge_patch14", 630.8), ("small_patch16", 21.7)],
)
def test_published_sizes(name, encoder_millions):
    """Encoders without head have 86 (ViT-B), 303 (ViT-L; 304 with positions) and 631 (ViT-H) million parameters."""
    with torch.device("meta"):
        vit = models_vit.VisionTransformer(
            **{**models_vit.MODELS[f"vit_{name}"].keywords, "num_classes": 10, "global_pool": False}
        )
    count = sum(p.numel() for n, p in vit.named_parameters() if not n.startswith("head."))
    assert count / 1e6 == pytest.approx(encoder_millions, abs=0.15)


@pytest.mark.parametrize("size", ["demo_patch4", "tiny_patch16", "small_patch16", "base_patch16", "large_patch16"])
def test_every_autoencoder_has_its_classifier(size):
    """Names and shapes of the tensors agree, so that every encoder can be fine-tuned."""
    mae = models_mae.MODELS[f"mae_vit_{size}"]
    vit = models_vit.MODELS[f"vit_{size}"]
    shared = ("patch_size", "embed_dim", "depth", "num_heads")
    assert [mae.keywords[name] for name in shared] == [vit.keywords[name] for name in shared]
    assert mae is models_mae.MODELS.get(f"mae_vit_{size}_dec512d8b", mae)


@pytest.mark.parametrize("pool", [True, False])
def test_classifier_pools_as_told(pool):
    """Permuting patches with their positions changes neither; the class token matters only where it is pooled."""
    model = models_vit.VisionTransformer(img_size=16, num_classes=3, global_pool=pool, **SMALL).eval()
    imgs = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(imgs)
    expected = model.fc_norm(tokens[:, 1:].mean(1)) if pool else tokens[:, 0]
    assert torch.allclose(model(imgs), model.head(expected), atol=1e-6)
    names = dict(model.named_parameters())
    assert ("fc_norm.weight" in names) == pool and ("norm.weight" in names) != pool


def test_probe_trains_its_head_alone():
    model = models_vit.make_linear_probe(models_vit.VisionTransformer(img_size=16, num_classes=3, **SMALL))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    assert model.head[0].eps == 1e-6 and not model.head[0].affine

"""Learning: after a short training the predictions for an image differ between its patches."""

import pytest
import torch
from conftest import SAMPLES
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

import engine_pretrain
import models_mae
from util import optim
from util.amp import LossScaler
from util.lr_sched import CosineSchedule
from util.updater import Updater

CPU = torch.device("cpu")


def spread_of_masked_predictions(zero_positions: bool) -> float:
    """Pre-train for 10 epochs on 125 images; return how much predictions vary between the patches of an image.

    That is the standard deviation over an image's masked patches, for each pixel of the patch, averaged over pixels
    and images, as a share of the target's.
    """
    torch.manual_seed(0)
    pictures = ImageFolder(SAMPLES / "train", TF.to_tensor)
    imgs = torch.stack([pictures[i][0] for i in range(0, len(pictures), 16)])
    imgs = (imgs - imgs.mean()) / imgs.std()  # [125, 3, 28, 28]
    model = models_mae.mae_vit_demo_patch4(img_size=28)
    if zero_positions:
        model.pos_embed.zero_(), model.decoder_pos_embed.zero_()
    epochs = 10
    optimizer, schedule = optim.pretrain_optimizer(model, 2e-3, 0.05), CosineSchedule(2e-3, 0, 2, epochs)
    updater = Updater(model, optimizer, schedule, LossScaler("off", CPU))
    for epoch in range(epochs):
        batches = [(batch, None) for batch in imgs[torch.randperm(len(imgs))].split(25)]
        engine_pretrain.train_one_epoch(model, batches, updater, epoch, print_freq=100)
    model.eval()
    with torch.no_grad():
        _, pred, mask = model(imgs[:100])
    removed = mask.bool()
    target = model.target(imgs[:100])

    def spread(patches: torch.Tensor) -> float:
        return torch.stack([p[r].std(dim=0).mean() for p, r in zip(patches, removed, strict=True)]).mean().item()

    return spread(pred) / spread(target)


def test_masked_predictions_differ_between_patches():
    assert spread_of_masked_predictions(zero_positions=False) >= 0.2


@pytest.mark.slow
def test_without_positions_they_would_not():
    """Without position embeddings the same measurement fails, which shows that it can."""
    with pytest.raises(AssertionError):
        assert spread_of_masked_predictions(zero_positions=True) >= 0.2

"""Whatever is random follows its seed, and differs where it should: between epochs, ranks, steps and samples."""

import argparse
import random

import numpy as np
import pytest
import ranks
import torch
from conftest import SAMPLES
from runs import job_argv, same

import main_finetune
import main_pretrain
import models_mae
from util import optim, rng
from util.data import datasets, loaders
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import Crop, FinetuneTransform

JOBS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main}


def test_the_stream_of_an_apple_gpu_is_kept_too(monkeypatch):
    stream = [torch.tensor([1])]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: stream[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", stream.append)
    state = rng.get_rng_state()
    rng.set_rng_state(state)
    assert torch.equal(state["mps"], torch.tensor([1])) and len(stream) == 2


def test_updates_can_be_skipped_on_an_apple_gpu(monkeypatch):
    """Its fused kernel did not look at the flag that says so."""
    flags = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **more: flags.append(more["fused"]))
    for device in ("mps", "cuda", "cpu"):
        optim.adamw([{"params": [argparse.Namespace(device=torch.device(device))]}], 1e-3, shard=False)
    assert flags == [False, True, True]


@pytest.fixture
def drawn(monkeypatch):
    """Lists of what runs in this process draw: the keys of their training images, and their masks."""
    keys, masks = [], []
    load, mask = datasets.TrainImages.__getitem__, models_mae.MaskedAutoencoderViT.random_masking

    def record_key(self, key):
        keys.append(key)
        return load(self, key)

    def record_mask(self, *arguments):
        result = mask(self, *arguments)
        if not result[1].is_meta:  # where the operations are counted
            masks.append(result[1])
        return result

    monkeypatch.setattr(datasets.TrainImages, "__getitem__", record_key)
    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "random_masking", record_mask)
    return keys, masks


def orders(keys):
    """Return the images' numbers in the order of each epoch."""
    epochs = sorted({epoch for epoch, _ in keys})
    return [[index for number, index in keys if number == epoch] for epoch in epochs]


@pytest.mark.parametrize("job", JOBS)
def test_a_run_shuffles_every_epoch_anew_by_its_seed(job, drawn, images):
    """80 images in batches of 8 or 16: every epoch has each once, in an order that the seed and the epoch tell."""
    keys, _ = drawn
    different = []
    for seed in (0, 5):  # orders follow from seed + epoch, as in torch's DistributedSampler
        keys.clear()
        JOBS[job](list(map(str, job_argv(images, "", "--num_workers", 0, "--epochs", 2, "--seed", seed, job=job))))
        different += orders(keys)
    assert len({tuple(order) for order in different}) == len(different) == 4
    assert all(sorted(order) == list(range(80)) for order in different)
    sampler = loaders.EpochSampler(80, 8, seed=5)
    assert [index for _, index in sampler] == different[2]


def test_masks_differ_from_step_to_step_and_follow_the_seed(drawn, images):
    _, masks = drawn
    found = []
    for seed in (0, 0, 1):
        masks.clear()
        flags = ["--num_workers", 0, "--seed", seed, "--monitor_freq", 0, "--patch_size", 4]
        main_pretrain.main([str(word) for word in job_argv(images, "", *flags)])
        found.append(torch.cat(masks))
    assert torch.equal(found[0], found[1])
    assert len(found[0].unique(dim=0)) == len(found[0]) == 240  # one for each image of each epoch
    assert not torch.equal(found[0], found[2])


def first_draws():
    """Return what each of the random streams gives first in this rank, which dist.init seeded."""
    streams = torch.rand(4), torch.tensor(np.random.rand(4)), torch.tensor([random.random()])
    return *streams, models_mae.mae_vit_demo_patch4(img_size=28).random_masking(torch.zeros(4, 49, 1), 0.75)[1]


def test_ranks_draw_differently_each_from_the_seed_plus_its_number(tmp_path):
    found = ranks.run(2, tmp_path, first_draws)
    assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for rank, (of_torch, of_numpy, *_) in enumerate(found):
        torch.manual_seed(rank)  # the tests' ranks have seed 0
        assert torch.equal(of_torch, torch.rand(4))
        assert np.array_equal(of_numpy, np.random.RandomState(rank).rand(4))


def train_images(seed=0, fraction=1.0, transform=None):
    transform = transform or Crop((28, 28), (0.2, 1.0))
    images = datasets.open_split(datasets.Images, DataSpec(str(SAMPLES)), "train", transform, PixelSpec())
    return datasets.TrainImages(images, seed, fraction)


AUGMENTATIONS = {
    "pretrain": Crop((28, 28), (0.2, 1.0)),
    "linprobe": Crop((28, 28), (0.08, 1.0), one_draw=True),
    "finetune": FinetuneTransform((28, 28), (0.08, 1.0), None, "rand-m9-mstd0.5-inc1", 0.5, "pixel", 1, PixelSpec()),
}


@pytest.mark.parametrize("job", AUGMENTATIONS)
def test_a_sample_follows_from_seed_epoch_and_index_alone(job):
    """Each of them changes it; whatever was drawn before does not."""
    once, other_seed = train_images(0, transform=AUGMENTATIONS[job]), train_images(1, transform=AUGMENTATIONS[job])

    def sample(dataset, epoch, index):
        img, target = dataset[epoch, index]
        return (getattr(img, "img", img), getattr(img, "boxes", None)), target

    first = sample(once, 0, 7)
    random.random(), np.random.rand(), torch.rand(1)
    assert same(sample(once, 0, 7), first)
    others = [sample(once, 1, 7), sample(once, 2, 7), sample(other_seed, 0, 7)]
    assert all(target == first[1] for _, target in others)
    assert not any(same(img, first[0]) for img, _ in others)


def test_copies_of_an_image_are_cropped_differently(tmp_path):
    source = next((SAMPLES / "train" / "bag").iterdir())
    for number in range(8):
        (tmp_path / "train" / "bag").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "bag" / f"{number}.png").write_bytes(source.read_bytes())
    images = datasets.open_split(
        datasets.Images, DataSpec(str(tmp_path)), "train", Crop((28, 28), (0.2, 1.0)), PixelSpec()
    )
    crops = torch.stack([datasets.TrainImages(images, 0)[0, index][0] for index in range(8)])
    assert len(crops.unique(dim=0)) == 8


def test_a_share_of_the_images_is_chosen_by_the_seed():
    chosen = [train_images(seed, 0.1).chosen.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == len(set(chosen[0])) == 200

"""Old checkpoints: runs of an earlier version resume with the same order and random numbers, and end alike.

old_checkpoints/ holds for each job the state in the middle of epoch 0 and at the end of the run, written by the last
version whose models had a second forward path. The models are tiny, so that the files are small.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import same
from timm.data import create_transform

import main_finetune
import main_pretrain
import models_mae
import models_vit
from util import misc
from util.data.erasing import ErasableImage
from util.rng import set_rng_state

OLD = Path(__file__).parent / "old_checkpoints"
ENCODER = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
COMMON = "--input_size 28 --warmup_epochs 1 --amp off --device cpu --num_workers 0 --epochs 2"
JOBS = {
    "pretrain": f"{COMMON} --model mae_vit_demo_patch4 --batch_size 8 --accum_iter 2 --blr 0.05 --norm_pix_loss",
    "finetune": (
        f"{COMMON} --model vit_demo_patch4 --nb_classes 10 --batch_size 16 --blr 0.01 --mixup 0.8 --cutmix 1.0 "
        "--aa none --reprob 0 --model_ema --model_ema_decay 0.9"
    ),
}


class CroppedByTimm:
    """Augmentation of the version that wrote the checkpoints, whose crops were timm's, with other random draws."""

    def __init__(self, size, scale, color_jitter, *_):
        self.crop_and_flip, _, _ = create_transform(
            size, is_training=True, separate=True, scale=scale, color_jitter=color_jitter, interpolation="bicubic"
        )

    def __call__(self, pixels):
        picture = self.crop_and_flip(Image.fromarray(pixels))
        return ErasableImage(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), [])


@pytest.fixture
def resume(images, tmp_path, monkeypatch):
    """Function that resumes a job's old checkpoint in this process.

    It returns the states that are saved, the first before any step.
    """
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    autoencoder = partial(models_mae.MaskedAutoencoderViT, **ENCODER, **decoder)
    monkeypatch.setattr(main_finetune, "FinetuneTransform", CroppedByTimm)
    monkeypatch.setitem(models_mae.MODELS, "mae_vit_demo_patch4", autoencoder)
    monkeypatch.setitem(models_vit.MODELS, "vit_demo_patch4", partial(models_vit.VisionTransformer, **ENCODER))

    def run(job):
        shutil.copy(OLD / f"{job}_middle.pth", tmp_path / "checkpoint-last.pth")
        states, resumed = [], misc.Checkpoints.resume

        def resume_and_save(self, *args, **kwargs):
            position = resumed(self, *args, **kwargs)
            set_rng_state(position.rng[0])
            self.save(position, whole_epoch=False)
            states.append(torch.load(tmp_path / "checkpoint-last.pth", weights_only=True))
            return position

        monkeypatch.setattr(misc.Checkpoints, "resume", resume_and_save)
        main = main_pretrain.main if job == "pretrain" else main_finetune.main
        main([*JOBS[job].split(), "--data_path", str(images), "--output_dir", str(tmp_path), "--resume", "auto"])
        return [*states, torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def without_key_bias(state):
    """Return the weights without the keys' third of each qkv bias.

    Its true gradient is zero, so that AdamW amplifies the rounding.
    """
    return {name: value.view(3, -1)[[0, 2]] if name.endswith("qkv.bias") else value for name, value in state.items()}


@pytest.mark.parametrize("job", JOBS)
def test_an_old_checkpoint_resumes(job, resume):
    begun, ended = resume(job)
    middle, end = (torch.load(OLD / f"{job}_{when}.pth", weights_only=True) for when in ("middle", "end"))
    assert (begun["position"].pop("branch"), begun["position"].pop("tested")) == (0, {})  # which they do not have
    for part in ("model", "model_ema", "optimizer", "rng", "position", "epoch"):
        if part == "optimizer":
            assert same(begun[part]["state"], middle[part]["state"])
        else:
            assert same(begun.get(part), middle.get(part)), part

    assert ended["epoch"] == end["epoch"] == 1
    assert same(ended["rng"], end["rng"]), "not the same number of random draws"
    for part in ("model", "model_ema"):
        ours, theirs = (without_key_bias(state.get(part, {})) for state in (ended, end))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] - value).abs().max() <= 1e-5, name  # another processor rounds differently
    stats = {name: ended["stats"][name] for name in end["stats"]}  # which had fewer figures
    assert stats == {name: pytest.approx(value, abs=1e-4) for name, value in end["stats"].items()}

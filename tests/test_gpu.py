"""CUDA devices: no step waits for the device, speed-ups leave the numbers alone, runs resume."""

import os
import random
import signal

import faults
import pytest
import torch
from runs import EVERY_STEP, assert_same_end, finish, job_argv, same, state, wait_for
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from util import optim, speed
from util.amp import LossScaler
from util.distributed import dist
from util.lr_sched import CosineSchedule
from util.updater import Updater

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


class Batches:
    """Batches on the device; waiting for the device is an error between the first logging step and the last."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        try:
            for number, batch in enumerate(self.batches):
                torch.cuda.set_sync_debug_mode("error" if 1 < number < len(self) - 1 else "default")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("job", ["pretrain", "grid", "block", "finetune", "linprobe"])
def test_no_step_waits_for_the_device(job, amp):
    """The jobs "grid" and "block" are pre-training with masks of that kind."""
    imgs, targets = torch.randn(8, 3, 32, 32, device=CUDA), torch.zeros(8, dtype=torch.long, device=CUDA)
    loader, scaler = Batches([(imgs, targets)] * 12), LossScaler(amp, CUDA)
    if job in ("pretrain", "grid", "block"):
        model = models_mae.MaskedAutoencoderViT(**SIZE, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        optimizer = optim.pretrain_optimizer(model.to(CUDA), 1e-3, 0.05)
    else:
        model = models_vit.VisionTransformer(**SIZE, num_classes=5, drop_path_rate=0.1)
        if job == "linprobe":
            optimizer = optim.probe_optimizer(models_vit.make_linear_probe(model).to(CUDA), [0.1], 0.0)
        else:
            optimizer = optim.finetune_optimizer(model.to(CUDA), 1e-3, 0.05, 0.75)
    speed.prepare(model, CUDA, scaler.amp, "auto", False, False)
    clip_grad = 1.0 if job in ("pretrain", "grid", "block") else None
    schedule = CosineSchedule(1e-3, 0.0, 0, 1)
    updater = Updater(model, optimizer, schedule, scaler, accum_iter=2, clip_grad=clip_grad)
    if job in ("pretrain", "grid", "block"):
        sampling = "random" if job == "pretrain" else job
        stats = engine_pretrain.train_one_epoch(model, loader, updater, 0, mask_sampling=sampling)
    else:
        stats = engine_finetune.train_one_epoch(model, nn.CrossEntropyLoss(), loader, updater, 0)
    assert stats["loss"] > 0


@pytest.mark.parametrize("setting", [("fused", False, False), ("fused", True, False), ("fused", False, True)])
def test_speed_ups_leave_the_numbers_alone(setting):
    def step(attention, compiled, grad_checkpoint):
        torch.manual_seed(0)
        model = models_mae.MaskedAutoencoderViT(**SIZE, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        speed.prepare(model.to(CUDA), CUDA, "off", attention, compiled, grad_checkpoint)
        torch.manual_seed(1)
        loss = model(torch.randn(8, 3, 32, 32, device=CUDA), noise=torch.rand(8, 16, device=CUDA))[0]
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, grads = step("plain", False, False)
    fast_loss, fast_grads = step(*setting)
    assert fast_loss == pytest.approx(loss, rel=1e-4) and (fast_grads - grads).norm() / grads.norm() < 1e-3


def test_a_sharded_optimiser_goes_on_from_its_checkpoint():
    """One rank suffices here: its ZeroRedundancyOptimizer holds the whole state."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:

        def build_optimizer(model):
            return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3, fused=True)

        def step(model, optimizer):
            model(torch.ones(2, 4, device=CUDA)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(CUDA)
        optimizer = build_optimizer(model)
        step(model, optimizer)
        dist.gather_optimizer(optimizer)
        state, weights = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
        step(model, optimizer)
        again = nn.Linear(4, 3).to(CUDA)
        again.load_state_dict(weights)
        other = build_optimizer(again)
        dist.load_optimizer(other, state)
        step(again, other)
        assert torch.equal(again.weight, model.weight) and not other.state
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("job", ["pretrain", "finetune", "linprobe"])
def test_a_killed_run_resumes_to_the_same_bits(job, attention, images, tmp_path):
    """The run, in bf16 and without compilation, is killed three times in mid-epoch."""
    more = ["--device", "cuda", "--amp", "bf16", "--no_compile", "--attention", attention, "--num_workers", 2]
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    finish(images, tmp_path / "undisturbed", *more, job=job)
    chance = random.Random(job)
    for _ in range(3):
        argv = job_argv(images, tmp_path / "killed", *EVERY_STEP, *more, "--resume", "auto", job=job)
        process = faults.start(job, argv, tmp_path / "killed" / "out")
        wait_for(tmp_path / "killed" / "out", r"epoch \d+/\d+ \[|trained")
        process.join(chance.uniform(0, 0.6))
        process.kill()
        assert faults.exit_code(process) in (-signal.SIGKILL, 0)
    finish(images, tmp_path / "killed", *more, job=job)
    assert_same_end(tmp_path / "killed", tmp_path / "undisturbed")


def test_a_compiled_run_resumes_on_the_gpu(images, tmp_path):
    """With every default: stopped by SIGTERM in mid-epoch, it resumes with the same order and random draws."""
    more = ["--device", "cuda", "--amp", "auto", "--num_workers", 2]
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    finish(images, tmp_path / "undisturbed", *more)
    argv = job_argv(images, tmp_path / "stopped", *more)
    process = faults.start("pretrain", argv, tmp_path / "stopped" / "out", ("slow_steps", 0.1))
    wait_for(tmp_path / "stopped" / "out", r"epoch 1/\d+ \[1/", timeout=120)
    os.kill(process.pid, signal.SIGTERM)
    assert faults.exit_code(process) == 143, (tmp_path / "stopped" / "out").read_text()[-3000:]
    finish(images, tmp_path / "stopped", *more)
    ours, theirs = state(tmp_path / "stopped"), state(tmp_path / "undisturbed")
    assert same(ours["rng"], theirs["rng"]) and ours["epoch"] == theirs["epoch"]
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, atol=1e-3, rtol=1e-3)

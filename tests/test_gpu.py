"""On a CUDA device: nothing waits for it between logging steps, and the speed-ups leave the numbers alone."""

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from util import dist, optim, speed
from util.amp import LossScaler
from util.lr_sched import CosineSchedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


class Batches:
    """Batches on the device; between the first logging step and the last, waiting for the device is an error."""

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
    """grid, block: pre-training with such masks, and as its script runs it, without the visible patches' loss."""
    imgs, targets = torch.randn(8, 3, 32, 32, device=CUDA), torch.zeros(8, dtype=torch.long, device=CUDA)
    loader, scaler = Batches([(imgs, targets)] * 12), LossScaler(amp, CUDA)
    if job in ("pretrain", "grid", "block"):
        model = models_mae.MaskedAutoencoderViT(**SIZE, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        model.loss_only = job != "pretrain"
        optimizer = optim.pretrain_optimizer(model.to(CUDA), 1e-3, 0.05)
    else:
        model = models_vit.VisionTransformer(**SIZE, num_classes=5, drop_path_rate=0.1)
        if job == "linprobe":
            optimizer = optim.probe_optimizer(models_vit.make_linear_probe(model).to(CUDA), [0.1], 0.0)
        else:
            optimizer = optim.finetune_optimizer(model.to(CUDA), 1e-3, 0.05, 0.75)
    speed.prepare(model, CUDA, scaler.amp, "auto", False, False)
    common = (loader, optimizer, CUDA, 0, scaler, CosineSchedule(1e-3, 0.0, 0, 1))
    if job in ("pretrain", "grid", "block"):
        sampling = "random" if job == "pretrain" else job
        stats = engine_pretrain.train_one_epoch(model, *common, accum_iter=2, clip_grad=1.0, mask_sampling=sampling)
    else:
        stats = engine_finetune.train_one_epoch(model, nn.CrossEntropyLoss(), *common, accum_iter=2)
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
    """Of one rank, whose ZeRO holds everything; ours is made so with several ranks only."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        def optimizer_of(model):
            return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3, fused=True)

        def step(model, optimizer):
            model(torch.ones(2, 4, device=CUDA)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(CUDA)
        optimizer = optimizer_of(model)
        step(model, optimizer)
        dist.gather_optimizer(optimizer)
        state, weights = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
        step(model, optimizer)
        again = nn.Linear(4, 3).to(CUDA)
        again.load_state_dict(weights)
        other = optimizer_of(again)
        dist.load_optimizer(other, state)
        step(again, other)
        assert torch.equal(again.weight, model.weight) and not other.state
    finally:
        torch.distributed.destroy_process_group()

"""Engines: gradient accumulation, exact evaluation, updates whose gradients are not finite."""

import io
import sys
import time

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

import engine_finetune
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, make_linear_probe
from util.amp import BadSteps, LossScaler, choose
from util.lars import LARS
from util.lr_sched import CosineSchedule
from util.report.flops import count_flops
from util.report.meters import Meters, _Progress
from util.updater import Updater, locate_in_group

CPU = torch.device("cpu")
CONSTANT = CosineSchedule(0.1, 0.1, 0, 1)


def train(model, batches, accum_iter, clip_grad=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine_finetune.train_one_epoch(
        model,
        nn.CrossEntropyLoss(),
        batches,
        Updater(model, optimizer, CONSTANT, LossScaler("off", CPU), accum_iter=accum_iter, clip_grad=clip_grad),
        0,
    )
    return model


def linear_model():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def random_batches(count, size=4):
    torch.manual_seed(1)
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(count)]


def concatenate(parts):
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def test_an_incomplete_last_group_is_an_update_of_its_own_mean():
    """Five batches in groups of two make updates of the means of batches 0-1, 2-3 and 4; the last is not halved."""
    data = random_batches(5)
    ours = train(linear_model(), data, accum_iter=2)
    expected = train(linear_model(), [concatenate(data[:2]), concatenate(data[2:4]), data[4]], accum_iter=1)
    assert torch.allclose(ours.weight, expected.weight, atol=1e-6)
    assert not torch.allclose(ours.weight, train(linear_model(), data[:4], accum_iter=2).weight, atol=1e-4)


def test_the_loss_of_fine_tuning_in_bf16_is_taken_in_float32():
    """timm's label smoothing, which keeps the type of the logits, is called with float32 under autocast, too."""
    seen = []

    def criterion(logits, targets):
        seen.append(logits.dtype)
        return LabelSmoothingCrossEntropy(0.1)(logits, targets)

    model = linear_model()
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=0.1), CONSTANT, LossScaler("bf16", CPU))
    engine_finetune.train_one_epoch(model, criterion, random_batches(2), updater, 0)
    assert seen == [torch.float32] * 2


def test_micro_steps_cover_an_epoch():
    parts = [locate_in_group(step, 7, 3) for step in range(7)]
    assert [p.size for p in parts] == [3, 3, 3, 3, 3, 3, 1]
    assert [p.first for p in parts] == [True, False, False, True, False, False, True]
    assert [p.last for p in parts] == [False, False, True, False, False, True, True]


def test_clipping_bounds_the_update():
    before = linear_model()
    start = torch.cat([before.weight.flatten(), before.bias]).detach()
    after = train(linear_model(), random_batches(1), accum_iter=1, clip_grad=0.01)
    moved = torch.cat([after.weight.flatten(), after.bias]).detach() - start
    assert moved.norm() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_top5_is_clamped_to_the_number_of_classes(capsys):
    """With 3 classes, top-5 accuracy is top-3 accuracy. The closing line keeps its form, since scripts parse it."""
    stats = engine_finetune.evaluate(linear_model(), random_batches(2), CPU, LossScaler("off", CPU))
    assert stats["acc5"] == 100
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"* Acc@1 {stats['acc1']:.3f} Acc@5 100.000 loss {stats['loss']:.3f}"


def nan_batch(size=4):
    return torch.full((size, 6), float("nan")), torch.zeros(size, dtype=torch.long)


def test_gradients_that_are_not_finite_change_nothing():
    """With one bad batch among three, alone or in an accumulation group, its update has no effect."""
    data = random_batches(3)
    expected = train(linear_model(), [data[0], data[2]], accum_iter=1)
    assert torch.equal(train(linear_model(), [data[0], nan_batch(), data[2]], accum_iter=1).weight, expected.weight)
    grouped = train(linear_model(), [data[0], nan_batch(), data[2]], accum_iter=2, clip_grad=1.0)
    assert torch.equal(grouped.weight, train(linear_model(), [data[2]], accum_iter=1, clip_grad=1.0).weight)


@pytest.mark.parametrize("make", ["adamw", "lars"])
def test_skipped_updates_leave_the_optimisers_state_alone(make):
    """The optimiser itself skips, as a tensor tells it, so that nothing waits for the device."""
    torch.manual_seed(0)
    model, scaler = linear_model(), LossScaler("off", CPU)
    if make == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    else:
        optimizer = LARS(model.parameters(), lr=0.1, weight_decay=0.1)

    def update(batch):
        scaler.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
        skipped = scaler.step(optimizer, model.parameters(), None)
        states = [value.clone() for state in optimizer.state.values() for value in state.values()]
        return skipped.item(), [p.detach().clone() for p in model.parameters()] + states

    good, before = update(random_batches(1)[0])
    bad, after = update(nan_batch())
    better, later = update(random_batches(1)[0])
    assert (good, bad, better) == (False, True, False) and len(before) >= 4
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after, later, strict=True))


def test_a_probes_statistics_survive_a_bad_batch():
    model = nn.Sequential(nn.BatchNorm1d(6, affine=False), linear_model())
    train(model, [*random_batches(1), nan_batch()], accum_iter=1)
    assert torch.isfinite(model[0].running_mean).all() and model[0].num_batches_tracked == 1


def test_bad_steps_are_counted_in_a_row_and_latched():
    bad = BadSteps(3, CPU, "bf16")
    for step, skipped in enumerate([0, 1, 1, 0, 1, 0]):
        bad.update(torch.tensor(bool(skipped)), step)
    assert bad.read() == (3, 1, False) and bad.read()[0] == 0
    for step, skipped in enumerate([1, 1, 1, 0]):
        bad.update(torch.tensor(bool(skipped)), step)
    assert bad.read() == (3, 0, True)


def test_overflows_that_the_fp16_scaler_absorbs_do_not_count():
    bad = BadSteps(2, CPU, "fp16")
    for step in range(16):
        bad.update(torch.tensor(True), step)
    assert bad.read() == (0, 0, False)
    for step in range(16, 18):
        bad.update(torch.tensor(True), step)
    assert bad.read() == (2, 16, True)


def test_meters_leave_out_and_count_what_is_not_finite():
    meters = Meters(CPU)
    for value in (1.0, float("nan"), 3.0, float("inf")):
        meters.update(loss=torch.tensor(value))
    assert meters.close_window() == ({"loss": 2.0}, [2]) and meters.averages() == {"loss": 2.0}


def test_meters_average_windows_and_epoch():
    meters = Meters(CPU)
    meters.update(loss=torch.tensor(1.0), lr=0.5)
    meters.update(loss=torch.tensor(2.0), lr=0.5)
    assert meters.close_window() == ({"loss": 1.5, "lr": 0.5}, [0])
    meters.update(loss=torch.tensor(6.0), lr=0.2)
    assert meters.totals_so_far() == {"loss": [9.0, 3.0], "lr": pytest.approx([1.2, 3.0])}
    assert meters.close_window()[0] == pytest.approx({"loss": 6.0, "lr": 0.2})
    assert meters.averages() == pytest.approx({"loss": 3.0, "lr": 0.4})


def test_speed_is_shown_and_reported_in_images_and_operations(capsys):
    reports = []
    meters = Meters(
        CPU, images_per_step=8, flops_per_image=5e9, on_report=lambda *report: reports.append(report), first_step=1
    )

    class Batches:
        """The last four batches of five, each of which takes 30 ms to come."""

        def __len__(self):
            return 5

        def __iter__(self):
            for batch in range(4):
                time.sleep(0.03)
                yield batch

    assert meters.epoch_speed() == {}
    start = time.perf_counter()
    for _ in meters.log_every(Batches(), print_freq=2, epoch=0):
        time.sleep(0.01)
    took = time.perf_counter() - start
    assert [report[0] for report in reports] == [2, 4]
    speed = reports[0][-1]
    assert 8 / took < speed["images_per_s"] <= 2 * 8 / 0.08
    assert speed["tflops"] == pytest.approx(speed["images_per_s"] * 5e-3)
    assert f"{speed['images_per_s']:.0f} img/s  {speed['tflops']:.3g} TFLOP/s  data" in capsys.readouterr().out
    whole = meters.epoch_speed()
    assert 4 * 8 * 5e-3 / took <= whole["tflops"] <= 4 * 8 * 5e-3 / 0.16
    assert 0.12 / took <= whole["data_wait"] <= 1 - 0.04 / took


def test_on_a_terminal_one_line_of_80_columns_shows_the_progress(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = _Progress(5004, 0, 12, 400)
    words = ["loss 0.4321", "lr 0.000159", "2850 img/s", "353 TFLOP/s", "data 5%", "23.9G"]
    for step in (0, 1233, 1234):
        monkeypatch.setattr(progress, "start", time.perf_counter() - 0.09 * (step + 1))
        progress.show(step, words)
    progress.close()
    line = terminal.getvalue().rstrip("\n")
    assert "\n" not in line and "12/400 1/5004 loss" in line  # one line, written again and again
    last = line.split("\r")[-1].rstrip()
    assert last.startswith("12/400 1235/5004 loss 0.4321 lr 0.000159 2850/s 353T data 5% 23.9G 0:05:")
    assert last.endswith(" 2d00h") and len(last) <= 80


def count_by_hand(tokens, width, depth):
    """Return the operations of a forward pass of blocks: four projections, attention's two products, and the MLP."""
    return depth * 2 * tokens * (4 * width**2 + 2 * tokens * width + 8 * width**2)


def test_operations_are_counted_as_by_hand():
    """Backward costs twice as much as forward, but for the images and a frozen encoder, which need no gradient."""
    patches, patch_pixels, width = 16, 48, 32
    embed, blocks, head = 2 * patches * patch_pixels * width, count_by_hand(1 + patches, width, 2), 2 * width * 5
    classifier = VisionTransformer(img_size=16, patch_size=4, embed_dim=width, depth=2, num_heads=2, num_classes=5)
    assert count_flops(classifier) == 2 * embed + 3 * (blocks + head)
    assert count_flops(make_linear_probe(classifier, heads=3)) == embed + blocks + 2 * 3 * head

    # Of 16 patches the encoder embeds and sees 4, and the decoder sees all.
    autoencoder = MaskedAutoencoderViT(16, 4, 3, width, 2, 2, 8, 1, 2)
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    decoder = 2 * 5 * width * 8 + count_by_hand(1 + patches, 8, 1) + 2 * (1 + patches) * 8 * patch_pixels
    assert count_flops(autoencoder, 0.75) == 2 * embed / 4 + 3 * (count_by_hand(1 + 4, width, 2) + decoder)
    assert all(torch.equal(before[name], tensor) for name, tensor in autoencoder.state_dict().items())
    assert all(parameter.grad is None for parameter in autoencoder.parameters())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(amp):
    """Loss and gradients of an autoencoder under autocast on the CPU are close to those in fp32."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(16, 4, 3, 32, 2, 2, 16, 1, 2)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)

    def grads(scaler):
        model.zero_grad()
        with scaler.autocast():
            loss = model(imgs, noise=noise)[0]
        scaler.backward(loss)
        scale = scaler.scaler.get_scale() if scaler.scaler.is_enabled() else 1.0
        flat = torch.cat([p.grad.flatten() / scale for p in model.parameters() if p.grad is not None])
        return loss.item(), flat

    loss, reference = grads(LossScaler("off", CPU))
    mixed_loss, mixed = grads(LossScaler(amp, CPU))
    assert mixed_loss == pytest.approx(loss, rel=1e-2)
    assert (mixed - reference).norm() / reference.norm() < 3e-2


def test_a_named_precision_is_taken_and_auto_resolved():
    assert choose("off", CPU) == "off" and choose("fp16", CPU) == "fp16"
    assert choose("auto", CPU) in ("bf16", "off")

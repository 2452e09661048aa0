"""Golden tests: models, engines and optimisers compute the numbers that the reference has computed.

The environment variable MAE_GOLDEN may name another folder with files of the same form as tests/golden; all sizes come
from its meta.json.
"""

import argparse
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import engine_finetune
import engine_pretrain
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, make_linear_probe
from util import misc, optim, speed
from util.amp import LossScaler
from util.checkpoint import weights
from util.lars import LARS
from util.lr_sched import CosineSchedule
from util.pos_embed import resize_pos_embed, sincos_pos_embed
from util.updater import Updater

GOLDEN = Path(os.environ.get("MAE_GOLDEN") or Path(__file__).parent / "golden")
META = json.loads((GOLDEN / "meta.json").read_text())
CONFIG = META["config"]
ENCODER = {name: CONFIG[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
DECODER = {name: CONFIG[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}


def load(name, device="cpu"):
    return load_file(GOLDEN / f"{name}.safetensors", str(device))


def select_prefix(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def assert_close(actual, expected, atol, what=""):
    actual, expected = (torch.as_tensor(value).double().cpu() for value in (actual, expected))
    assert actual.shape == expected.shape, what
    difference = (actual - expected).abs().max().item()
    assert difference <= atol, f"{what}: largest difference {difference:.3g}"


SPEED = {  # attention, compiled, grad_checkpoint
    "plain": ("plain", False, False),
    "fused": ("fused", False, False),
    "compiled": ("plain", True, False),
    "grad_checkpoint": ("plain", False, True),
    "all": ("fused", True, True),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Device of the models, with matrix products in full fp32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    assert not torch.backends.cuda.matmul.allow_tf32
    return torch.device(request.param)


@pytest.fixture
def looser(device):
    """Factor of every tolerance: greater on a GPU, which sums in another order."""
    return 10 if device.type == "cuda" else 1


# Compilation takes long on a CPU.
@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if SPEED[name][1] else name for name in SPEED])
def fast(request, device):
    """Function that applies a speed-up to a model; the same tolerances hold for all of them."""
    attention, compiled, grad_checkpoint = SPEED[request.param]
    if compiled and device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    return lambda model: speed.prepare(model, device, "off", attention, compiled, grad_checkpoint)


def autoencoder(norm_pix_loss):
    model = MaskedAutoencoderViT(**ENCODER, **DECODER, norm_pix_loss=norm_pix_loss)
    model.load_state_dict(select_prefix(load("mae_forward"), "state/"))
    return model


def build_schedule(run):
    return CosineSchedule(run["lr"], run["min_lr"], run["warmup_epochs"], run["epochs"])


class Recorder(nn.Module):
    """Model that an engine trains with the stored noise, and that records every loss and learning rate."""

    def __init__(self, model, optimizer, noise=None):
        super().__init__()
        self.model, self.optimizer, self.noise = model, optimizer, iter(noise if noise is not None else [])
        self.patch_embed = model.patch_embed
        self.losses, self.lrs = [], []

    def forward(self, imgs, mask_ratio=None, noise=None):
        # A group's learning rate divided by its scale is the schedule's.
        group = self.optimizer.param_groups[0]
        self.lrs.append(group["lr"] / group.get("lr_scale", 1.0))
        if mask_ratio is None:
            return self.model(imgs)
        loss, pred, mask = self.model(imgs, mask_ratio=mask_ratio, noise=next(self.noise))
        self.losses.append(loss.item())
        return loss, pred, mask


def build_updater(run, recorder, device, amp):
    scaler = LossScaler(amp, device)
    settings = {"accum_iter": run["accum_iter"], "clip_grad": run.get("clip_grad")}
    return Updater(recorder, recorder.optimizer, build_schedule(run), scaler, **settings)


def assert_final_weights(model, final, lr_sum, looser):
    """Assert that every tensor is within 1e-5, times looser, of the reference's.

    Only the keys' third of a qkv bias may differ by twice the sum of the learning rates: its true gradient is zero, so
    that AdamW amplifies the rounding.
    """
    state = model.state_dict()
    assert set(state) == set(final)
    for name, value in final.items():
        ours = state[name]
        if name.endswith("attn.qkv.bias"):
            _, keys, _ = ours.chunk(3)
            assert keys.isfinite().all()
            assert_close(keys, value.chunk(3)[1], 2 * lr_sum, f"{name} (keys)")
            ours, value = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (ours, value))
        assert_close(ours, value, 1e-5 * looser, name)


@pytest.mark.parametrize("name", [n for n in load("pos_embed") if n.startswith("sincos/")])
def test_sincos_positions(name):
    dim, grid = (int(re.search(rf"{key}=(\d+)", name)[1]) for key in ("dim", "grid"))
    assert_close(sincos_pos_embed(dim, (grid, grid))[0], load("pos_embed")[name], 1e-6)


@pytest.mark.parametrize("name", [n for n in load("pos_embed") if n.startswith("interpolate/")])
def test_resized_positions(name):
    old, new = (int(re.search(rf"{key}=(\d+)", name)[1]) for key in ("from", "to"))
    table = load("mae_forward")["state/pos_embed"]
    assert_close(resize_pos_embed(table, (old, old), (new, new)), load("pos_embed")[name], 1e-6)


def test_patchify_and_back():
    golden, model = load("mae_forward"), autoencoder(False)
    assert torch.equal(model.patchify(golden["patchify/in"]), golden["patchify/out"])
    assert torch.equal(model.unpatchify(golden["patchify/out"]), golden["patchify/in"])


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("ratio", CONFIG["mask_ratios"])
def test_mae_forward_and_gradients(norm_pix, ratio, device, looser):
    golden, model = load("mae_forward", device), autoencoder(norm_pix).to(device)
    expected = select_prefix(golden, f"forward/norm_pix={norm_pix}/mask_ratio={ratio}/")
    latent, mask, ids_restore = model.forward_encoder(golden["imgs"], ratio, golden["noise"])
    assert torch.equal(mask, expected["mask"]) and torch.equal(ids_restore, expected["ids_restore"])
    assert_close(latent, expected["latent"], 1e-5 * looser, "latent")
    assert_close(model.forward_decoder(latent, ids_restore), expected["pred"], 1e-5 * looser, "pred")
    loss, pred, mask = model(golden["imgs"], mask_ratio=ratio, noise=golden["noise"])
    assert_close(loss.reshape(1), expected["loss"], 1e-5 * looser, "loss")
    assert_close(pred, expected["pred"], 1e-5 * looser, "pred")
    loss.backward()
    norms = select_prefix(expected, "grad_norm/")
    trained = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(norms)
    for name, norm in norms.items():
        assert trained[name] == pytest.approx(norm.item(), rel=1e-4 * looser), name


def test_learning_rate_schedule():
    facts = META["lr_schedule"]
    for epoch, lr in facts["points"]:
        assert build_schedule(facts).at(epoch) == pytest.approx(lr, abs=1e-6 * facts["lr"])


def test_lars_steps():
    golden, facts = load("lars"), META["lars"]
    names = sorted({name.split("/")[0] for name in golden})
    params = {name: nn.Parameter(golden[f"{name}/0"].clone()) for name in names}
    settings = {key: facts[key] for key in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LARS(params.values(), **settings)
    for step in range(1, facts["steps"] + 1):
        for name, parameter in params.items():
            parameter.grad = golden[f"{name}/grad{step}"].clone()
        optimizer.step()
        for name, parameter in params.items():
            assert_close(parameter.detach(), golden[f"{name}/{step}"], 1e-6, f"{name}, step {step}")


@pytest.mark.parametrize("rate", list(META["layer_decay"]))
def test_layer_decay_groups(rate):
    model = VisionTransformer(**ENCODER, num_classes=CONFIG["classes"], global_pool=True)
    expected = META["layer_decay"][rate]
    weight_decay = max(decay for _, decay in expected.values())
    groups = optim.finetune_optimizer(model, 1.0, weight_decay, float(rate)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)]: [g["lr_scale"], g["weight_decay"]] for g in groups for p in g["params"]}
    assert list(ours) == list(expected), "the order of the optimiser's state"
    for name, values in expected.items():
        assert ours[name] == pytest.approx(values, abs=1e-6), name


def test_pretrain_decay_groups():
    model = autoencoder(False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optim.pretrain_optimizer(model, 1.0, META["pretrain_run"]["weight_decay"]).param_groups
    ours = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert list(ours.items()) == list(META["pretrain_weight_decay"].items())


def run_pretraining(golden, run, fast, device, amp="off"):
    model = autoencoder(run["norm_pix_loss"]).to(device)
    fast(model)
    optimizer = optim.pretrain_optimizer(model, run["lr"], run["weight_decay"])
    recorder = Recorder(model, optimizer, golden["noise"])
    updater = build_updater(run, recorder, device, amp)
    loader = [(imgs, None) for imgs in golden["imgs"]]
    stats = [
        engine_pretrain.train_one_epoch(recorder, loader, updater, epoch, mask_ratio=run["mask_ratio"])
        for epoch in range(run["epochs"])
    ]
    return model, optimizer, recorder, stats


def test_pretraining_run(fast, device, looser):
    golden, run = load("pretrain_run", device), META["pretrain_run"]
    model, _, recorder, stats = run_pretraining(golden, run, fast, device)
    assert_close(recorder.lrs, golden["lrs"], 1e-6, "learning rates")
    assert_close(recorder.losses, golden["losses"], 1e-5 * looser, "losses")
    assert stats == [pytest.approx(expected, abs=1e-5 * looser) for expected in run["epoch_stats"]]
    assert_final_weights(model, select_prefix(golden, "final/"), sum(recorder.lrs[:: run["accum_iter"]]), looser)


def test_optimizer_state_is_stored_in_the_published_order():
    """The stored checkpoint is the end of the stored run, so that its moments equal those of the same run here."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(GOLDEN / "reference_pretrain_checkpoint.pth", weights_only=True)
    golden, run = load("pretrain_run"), META["pretrain_run"]
    if not all(torch.equal(stored["model"][name], value) for name, value in select_prefix(golden, "final/").items()):
        pytest.skip("this set's checkpoint is of another run")
    _, optimizer, _, _ = run_pretraining(golden, run, lambda model: None, torch.device("cpu"))
    ours = optimizer.state_dict()
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in stored["optimizer"]["param_groups"]]
    for index, state in stored["optimizer"]["state"].items():
        assert ours["state"][index]["step"] == state["step"]
        assert_close(ours["state"][index]["exp_avg"], state["exp_avg"], 1e-5, f"state {index}")


def run_classifier(golden, run, model, optimizer, criterion, device, amp="off"):
    """Train with the project's engine; return learning rates and losses of the batches, and the means of the epochs."""
    recorder, losses, size = Recorder(model, optimizer), [], run["batch_size"]

    def recorded_criterion(logits, targets):
        losses.append(criterion(logits, targets))
        return losses[-1]

    loader = list(zip(golden["train/imgs"].split(size), golden["train/targets"].split(size), strict=True))
    updater = build_updater(run, recorder, device, amp)
    stats = [
        engine_finetune.train_one_epoch(recorder, recorded_criterion, loader, updater, epoch)
        for epoch in range(run["epochs"])
    ]
    return recorder.lrs, [loss.item() for loss in losses], stats


def assert_classifier(golden, run, model, losses, stats, looser):
    assert_close(losses, golden["losses"], 1e-5 * looser, "losses")
    assert stats == [pytest.approx(expected, abs=1e-5 * looser) for expected in run.get("epoch_stats", stats)]
    model.eval()
    with torch.no_grad():
        assert_close(model(golden["val/imgs"]), golden["val/logits"], 1e-5 * looser, "logits")


def run_finetuning(golden, run, fast, device, amp="off"):
    """Fine-tune as in the golden run; return the model and the results of run_classifier."""
    model = VisionTransformer(
        **ENCODER, num_classes=CONFIG["classes"], global_pool=run["global_pool"], drop_path_rate=run["drop_path"]
    )
    model.load_state_dict(select_prefix(golden, "init/"))
    fast(model.to(device))
    optimizer = optim.finetune_optimizer(model, run["lr"], run["weight_decay"], run["layer_decay"])
    criterion = partial(engine_finetune.weighted_cross_entropy, class_weights=None, smoothing=run["smoothing"])
    return model, *run_classifier(golden, run, model, optimizer, criterion, device, amp)


def run_probing(golden, run, fast, device, amp="off"):
    """Train a linear probe as in the golden run; return the model and the results of run_classifier."""
    model = make_linear_probe(
        VisionTransformer(**ENCODER, num_classes=CONFIG["classes"], global_pool=run["global_pool"])
    )
    model.load_state_dict(select_prefix(golden, "init/"))
    fast(model.to(device))
    optimizer = optim.probe_optimizer(model, [run["lr"]], run["weight_decay"])
    return model, *run_classifier(golden, run, model, optimizer, nn.CrossEntropyLoss(), device, amp)


@pytest.mark.parametrize("name", ["finetune_run_avg", "finetune_run_cls"])
def test_finetuning_run(name, fast, device, looser):
    golden, run = load(name, device), META[name]
    model, lrs, losses, stats = run_finetuning(golden, run, fast, device)
    assert_classifier(golden, run, model, losses, stats, looser)
    assert_final_weights(model, select_prefix(golden, "final/"), sum(lrs[:: run["accum_iter"]]), looser)

    sizes = [run["batch_size"], run["batch_size"]]  # unequal: N, N, the rest
    sizes.append(len(golden["val/imgs"]) - sum(sizes))
    batches = list(zip(golden["val/imgs"].split(sizes), golden["val/targets"].split(sizes), strict=True))
    stats = engine_finetune.evaluate(model, batches, device, LossScaler("off", device))
    assert stats["acc1"] == pytest.approx(run["val_exact"]["acc1"], abs=1e-4)
    assert stats["loss"] == pytest.approx(run["val_exact"]["loss"], abs=1e-5 * looser)


def test_linear_probing_run(device, looser):
    golden, run = load("linprobe_run", device), META["linprobe_run"]
    model, lrs, losses, stats = run_probing(golden, run, lambda model: None, device)
    assert_classifier(golden, run, model, losses, stats, looser)
    assert_final_weights(model, select_prefix(golden, "final/"), sum(lrs), looser)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["pretrain_run", "finetune_run_avg", "finetune_run_cls", "linprobe_run"])
def test_losses_in_bf16_with_compiled_blocks(name):
    """With the defaults on a GPU the loss of every batch is within 2 % of that of the fp32 run."""
    device = torch.device("cuda")
    golden, run = load(name, device), META[name]

    def fast(model):
        speed.prepare(model, device, "bf16", "auto", None, False)

    if name == "pretrain_run":
        losses = run_pretraining(golden, run, fast, device, "bf16")[2].losses
    elif name == "linprobe_run":
        losses = run_probing(golden, run, fast, device, "bf16")[2]
    else:
        losses = run_finetuning(golden, run, fast, device, "bf16")[2]
    assert losses == pytest.approx(golden["losses"].tolist(), rel=0.02)


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("name", ["finetune_run_avg", "finetune_run_cls"])
def test_reference_checkpoint_starts_finetuning(name, over_http, server, tmp_path):
    """From a file or from a server, the missing and surplus keys are those that the reference reports."""
    run = META[name]
    model = VisionTransformer(**ENCODER, num_classes=CONFIG["classes"], global_pool=run["global_pool"])
    source = str(GOLDEN / "reference_pretrain_checkpoint.pth")
    if over_http:
        shutil.copy(source, tmp_path / "pretrained.pth")
        source = f"{server}/pretrained.pth"
    missing, surplus = weights.load_pretrained(source, model)
    assert sorted(missing) == sorted(run["missing_keys_on_load"])
    assert sorted(surplus) == sorted(run["unexpected_keys_on_load"])


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_reference_checkpoint_resumes(job):
    """Model, epoch and optimiser state are restored, each moment at the parameter of its shape."""
    source = str(GOLDEN / f"reference_{job}_checkpoint.pth")
    stored = misc.load_checkpoint(source)
    if job == "pretrain":
        model = MaskedAutoencoderViT(**ENCODER, **DECODER)
        optimizer = optim.pretrain_optimizer(model, 1.0, 0.05)
    else:
        pooled = "fc_norm.weight" in stored["model"]
        model = VisionTransformer(**ENCODER, num_classes=CONFIG["classes"], global_pool=pooled)
        optimizer = optim.finetune_optimizer(model, 1.0, 0.05, 0.75)
    args = {"model": "reference", "batch_size": 1}
    checkpoints = misc.Checkpoints("", job, model, optimizer, LossScaler("off", torch.device("cpu")), args)
    assert checkpoints.resume(source).epoch == stored["epoch"] + 1
    assert all(torch.equal(value, stored["model"][name]) for name, value in model.state_dict().items())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stored["optimizer"]["state"]) == len(parameters)
    for index, parameter in enumerate(parameters):
        theirs = stored["optimizer"]["state"][index]
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], theirs["exp_avg_sq"])

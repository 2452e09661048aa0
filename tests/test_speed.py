"""Speed-ups leave the numbers alone; each head of a learning-rate sweep ends as it would alone."""

import functools
import json
import resource
import shutil
import sys

import pytest
import torch
from torch import nn

import main_linprobe
import models_mae
import models_vit
from util import speed
from util.distributed import dist

CPU = torch.device("cpu")
ENCODER = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def step(model, amp="off", **settings):
    """Return the loss and all gradients of a step in fp32.

    With amp="bf16" the model is prepared as for bf16, though the step itself is in fp32.
    """
    speed.prepare(model, CPU, amp, **{"attention": "plain", "compiled": False, "grad_checkpoint": False, **settings})
    model.train().zero_grad()
    torch.manual_seed(1)
    imgs = torch.randn(4, 3, 16, 16)
    if isinstance(model, models_mae.MaskedAutoencoderViT):
        loss = model(imgs)[0]
    else:
        loss = nn.functional.cross_entropy(model(imgs), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def autoencoder():
    torch.manual_seed(0)
    return models_mae.MaskedAutoencoderViT(**ENCODER, **DECODER)


def classifier():
    torch.manual_seed(0)
    return models_vit.VisionTransformer(**ENCODER, num_classes=3, drop_path_rate=0.3)


@pytest.mark.slow
def test_ddp_leaves_compiled_blocks_whole(script):
    """DDP would split each block into two graphs, at a megabyte of parameters.

    Graphs are counted before they become machine code, so that none needs to.
    """
    words = """
import functools
import torch
from torch._dynamo.utils import counters
import models_mae
from util import speed
from util.distributed import dist
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
speed.compile_problem = lambda device: ""
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
cpu = torch.device("cpu")
model = models_mae.MaskedAutoencoderViT(
    img_size=16, patch_size=8, embed_dim=512, depth=2, num_heads=8, decoder_embed_dim=256, decoder_depth=2
)
speed.prepare(model, cpu, "off", "auto", True, False)
model = dist.wrap(model, cpu, static_graph=True)
model(torch.randn(2, 3, 16, 16), mask_ratio=0.5)[0].backward()
print(counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"])
"""
    done = script("-c", words)
    graphs, compiled = map(int, done.stdout.split())
    assert graphs == compiled > 0, done.stderr


@pytest.mark.parametrize("build", [autoencoder, classifier])
@pytest.mark.parametrize(
    "setting",
    [
        {"attention": "fused"},
        {"grad_checkpoint": True},
        # Compilation takes long, and the golden tests have it, with everything else, among the default tests.
        pytest.param({"compiled": True, "amp": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
        pytest.param({"compiled": True, "grad_checkpoint": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_speed_ups_leave_loss_and_gradients_alone(build, setting):
    if "compiled" in setting and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    loss, grads = step(build())
    fast_loss, fast_grads = step(build(), **setting)
    assert fast_loss == pytest.approx(loss, abs=1e-6)
    assert (fast_grads - grads).norm() / grads.norm() < 1e-5


def test_compiled_and_checkpointed_models_keep_their_parameter_names():
    names = list(autoencoder().state_dict())
    model = autoencoder()
    speed.prepare(model, CPU, "bf16", "auto", True, True)
    assert list(model.state_dict()) == names


def test_blocks_of_different_stochastic_depth_share_their_compiled_code(monkeypatch):
    """PyTorch compiles at most eight versions of a function, and then runs it uncompiled.

    Graphs are counted before they are compiled, so that nothing needs to be.
    """
    monkeypatch.setattr(speed, "compile_problem", lambda device: "")
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = models_vit.VisionTransformer(**ENCODER | {"depth": 10}, num_classes=3, drop_path_rate=0.3)
    step(model, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # two graphs, since the first block's rate is 0


def test_stochastic_depth_drops_whole_images_as_often_as_it_should():
    torch.manual_seed(0)
    model = classifier()
    speed.prepare(model, CPU, "off", "plain", False, False)
    drop = model.blocks[1].drop_path1.train()
    found = drop(torch.ones(20_000, 2, 3))
    assert torch.equal(found.amin(dim=(1, 2)), found.amax(dim=(1, 2)))
    assert (found[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert found.mean().item() == pytest.approx(1, abs=0.02) and torch.equal(drop.eval()(found), found)


def test_grad_checkpoint_keeps_fewer_activations():
    def kept(**settings):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            step(classifier(), **settings)
        return sum(sizes)

    assert kept(grad_checkpoint=True) < 0.5 * kept()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    speed.keep_freed_memory()
    faults = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)  # 80 MB, 20,000 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults) < 5 * 20_000  # the allocator alternates between a few places


def test_attention_is_plain_only_where_that_is_faster():
    assert speed.choose_attention(CPU, "bf16") == "plain" and speed.choose_attention(CPU, "off") == "fused"
    assert speed.choose_attention(torch.device("cuda"), "bf16") == "fused"


SMALL = (
    "--input_size 28 --patch_size 7 --batch_size 16 --epochs 2 --warmup_epochs 0 --amp off --device cpu "
    "--num_workers 0 --model vit_demo_patch4 --nb_classes 10"
)


def test_each_head_of_a_sweep_ends_as_it_would_alone(images, tmp_path, capsys):
    """Parameters, accuracy and loss agree, and the accuracy of the best head is logged as the run's."""

    def probe(name, *rates):
        where = ["--data_path", str(images), "--output_dir", str(tmp_path / name)]
        main_linprobe.main([*SMALL.split(), *where, "--blr", *map(str, rates)])
        log = json.loads((tmp_path / name / "log.txt").read_text().splitlines()[-1])
        return log, torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True)["model"]

    rates = [8, 32, 128]
    together, heads = probe("sweep", *rates)
    assert "blr32: Acc@1" in capsys.readouterr().out
    for number, rate in enumerate(rates):
        alone, model = probe(f"alone{number}", rate)
        assert torch.allclose(heads[f"head.1.heads.{number}.weight"], model["head.1.weight"], atol=1e-6)
        assert together[f"test_acc1_blr{rate:g}"] == alone["test_acc1"]
        assert together[f"test_loss_blr{rate:g}"] == pytest.approx(alone["test_loss"], rel=1e-5)
    assert together["test_acc1"] == max(together[f"test_acc1_blr{rate:g}"] for rate in rates)
    assert not torch.allclose(heads["head.1.heads.0.weight"], heads["head.1.heads.2.weight"], atol=1e-3)


def test_only_preparing_a_model_changes_the_allocator(monkeypatch):
    """Joining the other processes does not."""
    calls = []
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: calls.append(1))
    dist.init("cpu", 0)
    assert not calls
    speed.prepare(autoencoder(), CPU, "off", "auto", False, False)
    assert calls

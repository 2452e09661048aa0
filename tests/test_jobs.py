"""Jobs: the three training scripts on real images, with the published commands, resumed, and on two ranks."""

import json

import faults
import pytest
import torch
from conftest import link_images

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util.errors import UserError
from util.report import flops, log

MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "linprobe": main_linprobe.main}

# The published flags, word for word; SMALL then overrides some, to fit 80 images of 28 x 28 pixels.
PRETRAIN = (
    "--batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800 --warmup_epochs 40 "
    "--blr 1.5e-4 --weight_decay 0.05"
)
FINETUNE = (
    "--accum_iter 4 --batch_size 32 --model vit_base_patch16 --epochs 100 --blr 5e-4 --layer_decay 0.65 "
    "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval"
)
PROBE = "--batch_size 512 --model vit_base_patch16 --cls_token --epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval"
EVALUATE = "--eval --model vit_base_patch16 --batch_size 16"
SMALL = "--input_size 28 --batch_size 16 --num_workers 0 --device cpu --warmup_epochs 0"
SMALL_VIT = f"{SMALL} --model vit_demo_patch4 --nb_classes 10"


def flags(*parts, **values):
    return [w for p in parts for w in p.split()] + [w for k, v in values.items() for w in (f"--{k}", str(v))]


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def pretrain(images, out, *more, epochs=1, resume=""):
    small = f"{SMALL} --model mae_vit_demo_patch4"
    main_pretrain.main(flags(PRETRAIN, small, *more, data_path=images, output_dir=out, epochs=epochs, resume=resume))
    return out / f"checkpoint-{epochs - 1}.pth"


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    return pretrain(images, tmp_path_factory.mktemp("pretrain"))


def test_published_pretraining_command(pretrained):
    stored = torch.load(pretrained, weights_only=True)
    assert stored["epoch"] == 0 and stored["args"]["mask_ratio"] == 0.75 and stored["model_config"]["norm_pix_loss"]
    (line,) = log_lines(pretrained.parent)
    assert set(line) == {
        "train_loss",
        "train_lr",
        "test_loss",
        "test_knn",
        "epoch",
        "n_parameters",
        "data_wait",
        "tflops",
    }
    assert line["tflops"] > 0
    assert line["n_parameters"] == sum(v.numel() for k, v in stored["model"].items() if "pos_embed" not in k)
    assert list(pretrained.parent.glob("events.out.tfevents.*"))


def test_a_loss_whose_operations_cannot_be_counted_is_trained_all_the_same(images, tmp_path, monkeypatch, capsys):
    """Operations are counted on tensors without values; a loss that asks for values fails there."""

    def forward_loss(self, imgs, pred, mask):
        assert torch.isfinite(pred).all()
        return (pred - self.target(imgs)).square()[mask.bool()].mean()

    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "forward_loss", forward_loss)
    monkeypatch.setattr(log, "count_flops", flops.count_flops)  # the tests' own remembers the model
    pretrain(images, tmp_path, "--monitor_freq 0")
    said = capsys.readouterr().out
    assert "notice: no TFLOP/s, since the model's operations could not be counted" in said and "GFLOP" not in said
    (line,) = log_lines(tmp_path)
    assert line["train_loss"] > 0 and line["tflops"] == 0


@pytest.mark.parametrize(("job", "published"), [("finetune", FINETUNE), ("linprobe", PROBE)])
def test_published_classifier_commands_and_their_evaluation(job, published, pretrained, images, tmp_path, capsys):
    MAINS[job](flags(published, SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=1, finetune=pretrained))
    (line,) = log_lines(tmp_path)
    assert set(line) == {
        "train_loss",
        "train_lr",
        "test_acc1",
        "test_acc5",
        "test_loss",
        "test_balanced_acc",
        "test_macro_f1",
        "epoch",
        "n_parameters",
        "data_wait",
        "tflops",
    }
    stored = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert len(stored["class_to_idx"]) == 10
    trained = capsys.readouterr().out
    assert "new here: " in trained and "not used: decoder_blocks.*" in trained

    # --eval of the checkpoint prints the logged figures; it needs no train/ folder.
    (tmp_path / "val").symlink_to(images / "val")
    token = "--cls_token" if job == "linprobe" else ""
    MAINS[job](flags(EVALUATE, SMALL_VIT, token, data_path=tmp_path, resume=tmp_path / "checkpoint-0.pth"))
    expected = f"* Acc@1 {line['test_acc1']:.3f} Acc@5 {line['test_acc5']:.3f} loss {line['test_loss']:.3f}"
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_probing_leaves_the_encoder_alone(pretrained, images, tmp_path):
    main_linprobe.main(flags(PROBE, SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=2, finetune=pretrained))
    before, after = (
        torch.load(path, weights_only=True)["model"] for path in (pretrained, tmp_path / "checkpoint-1.pth")
    )
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("head."))
    assert after["head.0.num_batches_tracked"] == 2 * 5 and after["head.1.weight"].std() > 0


def test_resume_goes_on_at_the_next_epoch(images, tmp_path):
    path = pretrain(images, tmp_path, "--save_freq 1", epochs=2)
    pretrain(images, tmp_path, "--resume_override", epochs=3, resume=path)
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2]
    stored = torch.load(tmp_path / "checkpoint-2.pth", weights_only=True)
    assert stored["epoch"] == 2 and stored["optimizer"]["state"][0]["step"] == 3 * 5


def test_patch_size_overrides_the_models(images, tmp_path):
    path = pretrain(images, tmp_path, "--patch_size 7 --amp off")
    stored = torch.load(path, weights_only=True)
    assert stored["model"]["patch_embed.proj.weight"].shape[-1] == 7 and stored["model_config"]["patch_size"] == 7


def test_too_small_a_head_names_the_flag_to_pass(images, tmp_path):
    """A head with fewer outputs than there are class folders is an error that names the flag."""
    with pytest.raises(UserError, match="pass --nb_classes 10"):
        main_finetune.main(flags(FINETUNE, SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=1, nb_classes=3))


@pytest.mark.parametrize("job", MAINS)
def test_two_processes_end_with_the_same_parameters(job, images, pretrained, tmp_path):
    """Parameters and buffers agree after training with accumulation, though masks and mixup differ between ranks."""
    published = {
        "pretrain": f"{PRETRAIN} {SMALL} --model mae_vit_demo_patch4",
        "finetune": f"{FINETUNE} {SMALL_VIT} --finetune {pretrained}",
        "linprobe": f"{PROBE} {SMALL_VIT} --finetune {pretrained}",
    }[job]
    argv = flags(published, data_path=images, output_dir=tmp_path, epochs=2, batch_size=8, accum_iter=2)
    output = faults.run_ranks(job, argv, tmp_path, ("dump_ranks", tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, ranks[1]["model"][name]) for name, value in ranks[0]["model"].items())
    assert ranks[0]["stats"] == ranks[1]["stats"] and ranks[0]["next"] != ranks[1]["next"]
    before = torch.load(pretrained, weights_only=True)["model"] if job != "pretrain" else {}
    assert job == "linprobe" or not torch.equal(ranks[0]["model"]["cls_token"], before.get("cls_token", torch.zeros(1)))
    assert len(log_lines(tmp_path)) == 2 and output.count("trained 2 epochs") == 1
    assert output.count("training  effective batch 32 = 8 x 2 x 2 ranks, ") == 1


@pytest.mark.parametrize("share", ["", "--dist_eval"])
def test_evaluation_counts_every_image_once_on_two_processes(share, images, pretrained, tmp_path, capsys):
    """The closing line for 29 images on 2 ranks is that of one process, with and without --dist_eval."""
    main_linprobe.main(flags(PROBE, SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=1, finetune=pretrained))
    # 29 images, a number that 2 ranks cannot share equally.
    val = tmp_path / "data" / "val"
    link_images(images / "val", val)
    next(iter(sorted(val.glob("*/*")))).unlink()
    words = flags(
        "--eval --cls_token",
        SMALL_VIT,
        share,
        data_path=tmp_path / "data",
        resume=tmp_path / "checkpoint-0.pth",
        batch_size=4,
        amp="off",
    )
    capsys.readouterr()
    main_linprobe.main(words)
    expected = capsys.readouterr().out.splitlines()[-1]
    output = faults.run_ranks("linprobe", words, tmp_path)
    assert [line for line in output.splitlines() if line.startswith("* Acc@1")] == [expected]


def test_the_ema_is_the_same_on_all_ranks(images, tmp_path, capsys):
    """Two ranks that evaluate the EMA, each on its share, get the loss that one process gets from the checkpoint."""
    average = "--model_ema --model_ema_decay 0.9 --dist_eval --amp off"
    words = flags(average, SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=1)
    faults.run_ranks("finetune", words, tmp_path)
    main_finetune.main([*map(str, words), "--eval", "--resume", str(tmp_path / "checkpoint-0.pth")])
    assert f"loss {log_lines(tmp_path)[-1]['test_ema_loss']:.3f}" in capsys.readouterr().out.splitlines()[-1]


def test_the_scripts_run_as_commands(images, pretrained, tmp_path, script):
    done = script(
        "main_finetune.py", *flags(SMALL_VIT, data_path=images, output_dir=tmp_path, epochs=1, finetune=pretrained)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "* Acc@1" in done.stdout and (tmp_path / "checkpoint-0.pth").is_file()

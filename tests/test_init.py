"""--init: pre-training that starts from an encoder, or an encoder and decoder, of any origin."""

import shutil
import signal

import faults
import pytest
import timm
import torch
import transformers
from runs import EVERY_STEP, assert_same_end, finish, job_argv, state, wait_for
from safetensors.torch import save_file

import main_export
import main_pretrain
import models_load
import models_mae
from util import masking
from util.checkpoint import weights
from util.checkpoint.files import load_checkpoint
from util.errors import UserError

CPU = torch.device("cpu")
SIZES = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 4, "img_size": 28}


def autoencoder(**sizes):
    return models_mae.mae_vit_demo_patch4(**({"img_size": 28} | sizes))


def is_decoder(name):
    return name.startswith("decoder_") or name == "mask_token"


@pytest.fixture(scope="module")
def source():
    """Autoencoder with weights of its own."""
    torch.manual_seed(5)
    model = autoencoder()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def released_encoder(source, folder):
    state = {name: value for name, value in source.state_dict().items() if not is_decoder(name)}
    torch.save({"model": state}, folder / "encoder.pth")
    return folder / "encoder.pth", state


def released_full(source, folder):
    torch.save({"model": source.state_dict()}, folder / "full.pth")
    return folder / "full.pth", source.state_dict()


def timm_encoder(source, folder):
    theirs = timm.models.VisionTransformer(**SIZES, num_classes=5)
    save_file(theirs.state_dict(), folder / "timm.safetensors")
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    return folder / "timm.safetensors", state


def hugging_face_folder(source, folder):
    keeper = {"model": source.state_dict(), "model_config": {"model": "mae_vit_demo_patch4", **source.config}}
    torch.save(keeper, folder / "ours.pth")
    main_export.main(["--resume", str(folder / "ours.pth"), "--to", "hf", "--output", str(folder / "hf")])
    return folder / "hf", source.state_dict()


def hugging_face_encoder(source, folder):
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=28, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    return folder / "vit", load_checkpoint(str(folder / "vit"))["model"]


def lightning_autoencoder(source, folder):
    state = {f"model.mae.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "loops": {}}, folder / "lightning.ckpt")
    return folder / "lightning.ckpt", source.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        released_encoder,
        released_full,
        timm_encoder,
        hugging_face_folder,
        hugging_face_encoder,
        lightning_autoencoder,
    ],
)
def test_every_weight_of_the_file_is_taken_bit_for_bit(make, source, tmp_path):
    """With a decoder in the file, the first loss under fixed masks is the source's."""
    file, expected = make(source, tmp_path)
    model = autoencoder()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    weights.load_initial(str(file), model, {})
    taken = model.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in expected.items())
    for name in set(taken) - set(expected):
        assert is_decoder(name) and torch.equal(taken[name], fresh[name]), name
    if "decoder_pred.weight" in expected:
        noise = masking.fixed_noise("random", ["a", "b"], 0, (7, 7), CPU)
        imgs = torch.randn(2, 3, 28, 28)
        losses = [float(m.eval()(imgs, mask_ratio=0.75, noise=noise)[0]) for m in (model, source)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_positions_of_encoder_and_decoder_are_resized(source, tmp_path, capsys):
    file, _ = released_full(source, tmp_path)
    model = autoencoder(img_size=32)
    weights.load_initial(str(file), model, {})
    out = capsys.readouterr().out
    assert "positions resized from 7 x 7 to 8 x 8" in out and "the decoder's positions resized" in out
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)


@pytest.mark.parametrize(
    ("sizes", "spoil", "message"),
    [
        ({"decoder_embed_dim": 32}, None, r"decoder width: 64 in the file, 32 here \(--decoder_dim\)"),
        ({"decoder_depth": 1}, None, r"decoder blocks: 2 in the file, 1 here \(--decoder_depth\)"),
        ({"in_chans": 1}, None, r"channels: 3 in the file, 1 here \(--in_chans\)"),
        ({}, lambda s: s.pop("decoder_blocks.1.attn.qkv.weight"), "the file lacks decoder_blocks.1.attn.qkv.weight"),
        ({}, lambda s: s.pop("norm.weight"), "the file lacks norm.weight"),
        ({}, lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(128)}), "LayerScale"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(sizes, spoil, message, source, tmp_path):
    state = dict(source.state_dict())
    if spoil:
        spoil(state)
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        weights.load_initial(str(tmp_path / "file.pth"), autoencoder(**sizes), {})


def test_other_heads_of_the_decoder_are_refused(source, tmp_path):
    keeper = {"model": source.state_dict(), "model_config": {"model": "mae_vit_demo_patch4", **source.config}}
    torch.save(keeper, tmp_path / "file.pth")
    with pytest.raises(UserError, match="the decoder's attention heads: 4 in the file, 8 here .--decoder_heads"):
        weights.load_initial(str(tmp_path / "file.pth"), autoencoder(decoder_num_heads=8), {})


def test_another_loss_of_the_decoder_is_noticed(source, tmp_path, capsys):
    keeper = {"model": source.state_dict(), "model_config": {"model": "mae_vit_demo_patch4", **source.config}}
    torch.save(keeper, tmp_path / "file.pth")
    weights.load_initial(str(tmp_path / "file.pth"), autoencoder(), {"norm_pix_loss": True})
    assert "was made with --norm_pix_loss at its default, here it is True" in capsys.readouterr().out


def test_a_file_that_does_not_tell_its_targets_is_noticed(source, tmp_path, capsys):
    torch.save({"model": source.state_dict()}, tmp_path / "file.pth")
    for norm_pix_loss, noticed in ((False, True), (True, False)):
        weights.load_initial(str(tmp_path / "file.pth"), autoencoder(), {"norm_pix_loss": norm_pix_loss})
        assert ("does not say whether its targets were normalised" in capsys.readouterr().out) == noticed
        models_load.autoencoder(load_checkpoint(str(tmp_path / "file.pth")), "file.pth", norm_pix_loss)
        assert ("does not say whether its targets were normalised" in capsys.readouterr().out) == noticed
    torch.save({"model": source.state_dict(), "model_config": source.config}, tmp_path / "file.pth")
    models_load.autoencoder(load_checkpoint(str(tmp_path / "file.pth")), "file.pth")
    assert "does not say" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def initialised(images, source, tmp_path_factory):
    """File to start from, and the folder of a run that started from it and was not interrupted."""
    root = tmp_path_factory.mktemp("init")
    file, _ = released_full(source, root)
    (root / "run").mkdir()
    finish(images, root / "run", "--num_workers", 0, "--init", file, "--patch_size", 4)
    return file, root / "run"


def test_a_run_from_a_file_killed_and_resumed_ends_with_the_same_bits(images, initialised, tmp_path):
    """--resume auto beside --init starts from the file once, and goes on from the checkpoints afterwards."""
    file, undisturbed = initialised
    more = ["--num_workers", 0, "--init", file, "--resume", "auto", "--patch_size", 4]
    argv = job_argv(images, tmp_path, *EVERY_STEP, *more)
    process = faults.start("pretrain", argv, tmp_path / "out", ("slow_steps", 0.05))
    wait_for(tmp_path / "out", r"epoch 1/\d+ \[1/")
    process.kill()
    assert faults.exit_code(process) == -signal.SIGKILL
    assert "starting from" in (tmp_path / "out").read_text()
    said = finish(images, tmp_path, "--num_workers", 0, "--init", file, "--patch_size", 4)
    assert "resuming from" in said and "starting from" not in said and "flags that differ" not in said
    assert_same_end(tmp_path, undisturbed)


def test_an_encoder_with_the_configuration_of_an_autoencoder(tmp_path):
    """Hugging Face's ViTMAEModel has no decoder, but its configuration has one's sizes."""
    config = transformers.ViTMAEConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=28, patch_size=4
    )
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    model = autoencoder()
    weights.load_initial(str(tmp_path), model, {})
    assert torch.equal(model.cls_token, load_checkpoint(str(tmp_path))["model"]["cls_token"])


def test_the_file_is_not_needed_once_there_are_checkpoints(images, initialised, tmp_path):
    _, undisturbed = initialised
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-last.pth").unlink()
    more = ["--num_workers", 0, "--init", tmp_path / "gone.pth", "--patch_size", 4]
    said = finish(images, tmp_path / "run", *more)
    assert "resuming from" in said


def test_ranks_start_from_the_file_alike(images, initialised, tmp_path):
    file, undisturbed = initialised
    argv = job_argv(images, tmp_path, "--patch_size", 4, "--num_workers", 0, "--init", file, "--batch_size", 4)
    faults.run_ranks("pretrain", argv, tmp_path)
    one, two = state(undisturbed)["model"], state(tmp_path)["model"]
    assert (one["norm.weight"] - two["norm.weight"]).abs().max() < 0.1


def test_a_missing_file_and_its_own_removal_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="--init .*none.pth: no such file"):
        main_pretrain.main([str(word) for word in job_argv(images, "", "--init", tmp_path / "none.pth")])
    (tmp_path / "checkpoint-0.pth").touch()
    argv = job_argv(images, tmp_path, "--patch_size", 4, "--init", tmp_path / "checkpoint-0.pth", "--overwrite")
    with pytest.raises(UserError, match="--overwrite would remove --init .* itself"):
        main_pretrain.main([str(word) for word in argv])
    (tmp_path / "link.pth").symlink_to("checkpoint-0.pth")
    with pytest.raises(UserError, match="--overwrite would remove --init .* itself"):
        main_pretrain.main([str(word) for word in [*argv, "--init", tmp_path / "link.pth"]])

"""Checkpoints: plain to open, safe to open, and told apart when they don't fit."""

import pickle

import pytest
import torch

import models_mae
import models_vit
from util import misc, optim
from util.amp import LossScaler
from util.errors import UserError

CPU = torch.device("cpu")
ENCODER = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder(**changes):
    return models_mae.MaskedAutoencoderViT(**{**ENCODER, **DECODER, **changes})


def classifier(**changes):
    return models_vit.VisionTransformer(**{**ENCODER, "num_classes": 3, **changes})


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of ours after one update; returns its path and the model."""
    model = autoencoder(norm_pix_loss=True)
    optimizer, scaler = optim.pretrain_optimizer(model, 1e-3, 0.05), LossScaler("off", CPU)
    scaler.backward(model(torch.randn(2, 3, 16, 16))[0])
    scaler.step(optimizer, model.parameters(), None)
    misc.save_checkpoint(str(tmp_path), 4, model, optimizer, scaler, {"model": "small", "lr": None, "seed": 0})
    return str(tmp_path / "checkpoint-4.pth"), model


def test_our_checkpoints_open_without_an_allow_list_and_describe_themselves(checkpoint):
    path, model = checkpoint
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"model", "model_config", "optimizer", "scaler", "epoch", "args"}
    assert type(stored["args"]) is dict and stored["model_config"]["model"] == "small"
    rebuilt = models_mae.from_config(stored["model_config"])
    rebuilt.load_state_dict(stored["model"])
    assert rebuilt.norm_pix_loss and all(
        torch.equal(a, b) for a, b in zip(rebuilt.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_classifiers_keep_their_classes_and_rebuild(tmp_path):
    for probe in (False, True):
        model = classifier(global_pool=not probe)
        model = models_vit.make_linear_probe(model) if probe else model
        optimizer = optim.probe_optimizer(model, 0.1, 0.0)
        args = {"model": "vit"}
        misc.save_checkpoint(str(tmp_path), 0, model, optimizer, LossScaler("off", CPU), args, {"cat": 0, "dog": 1})
        stored = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
        assert stored["class_to_idx"] == {"cat": 0, "dog": 1}
        models_vit.from_config(stored["model_config"]).load_state_dict(stored["model"])


def test_resume_brings_back_model_optimiser_and_epoch(checkpoint):
    path, model = checkpoint
    other = autoencoder()
    optimizer = optim.pretrain_optimizer(other, 1.0, 0.5)
    assert misc.resume(path, other, optimizer, LossScaler("off", CPU)) == 5
    assert torch.equal(other.mask_token, model.mask_token)
    assert optimizer.state[other.mask_token]["step"] == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]


def test_the_encoder_goes_into_a_classifier_of_another_grid(checkpoint, capsys):
    path, model = checkpoint
    vit = classifier(img_size=24)
    missing, surplus = misc.load_pretrained(path, vit, global_pool=True)
    assert missing == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert "mask_token" in surplus and "norm.weight" in surplus
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert torch.equal(vit.pos_embed[:, 0], model.pos_embed[:, 0]) and vit.pos_embed.shape == (1, 37, 16)
    out = capsys.readouterr().out
    assert "positions resized from 4 x 4 to 6 x 6" in out and "new here: fc_norm.*, head.*;" in out
    assert "decoder_blocks.*, decoder_embed.*, decoder_norm.*, decoder_pos_embed, decoder_pred.*, mask_token" in out


def test_encoder_only_files_and_bare_state_dicts_start_finetuning(checkpoint, tmp_path):
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)["model"]
    encoder = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask_token"))}
    for content in (encoder, {"model": encoder}):
        torch.save(content, tmp_path / "encoder.pth")
        _, surplus = misc.load_pretrained(str(tmp_path / "encoder.pth"), classifier(), global_pool=True)
        assert surplus == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "lacks blocks.1.attn.qkv.weight"),
        (lambda s: s.update({"blocks.2.norm1.weight": torch.zeros(16)}), "has no blocks.2.norm1.weight"),
        (lambda s: s.update({"head.weight": torch.zeros(3, 16)}), "has no head.weight"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 8)}), r"cls_token is \[1, 1, 8\] in the file"),
    ],
)
def test_anything_unexpected_in_a_pretrained_file_is_an_error_that_names_it(checkpoint, tmp_path, spoil, named):
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)
    spoil(state["model"])
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=named):
        misc.load_pretrained(str(tmp_path / "bad.pth"), classifier(), global_pool=True)


def test_resuming_another_architecture_names_both_sides(checkpoint):
    path, _ = checkpoint
    with pytest.raises(UserError, match=r"does not fit --model(.|\n)*the file lacks blocks\.2"):
        misc.resume(path, autoencoder(depth=3))
    with pytest.raises(UserError, match=r"cls_token is \[1, 1, 16\] in the file and \[1, 1, 32\] in the model"):
        misc.resume(path, autoencoder(embed_dim=32))


class Hostile:
    """Unpickled in the ordinary way, this creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("over_http", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, server, over_http):
    marker, file = tmp_path / "marker", tmp_path / "hostile.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": Hostile(marker)}, file)
    with pytest.raises(UserError, match="refused: it holds io.open, and loading it could run code"):
        misc.load_checkpoint(f"{server}/hostile.pth" if over_http else str(file))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker))).close()
    assert marker.exists(), "the trap itself works"


def test_two_addresses_that_end_alike_are_not_mixed_up(tmp_path, server):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        torch.save({"weight": torch.full((1,), float(number))}, tmp_path / str(number) / "model.pth")
    for number in (1, 2, 1):
        stored = misc.load_checkpoint(f"{server}/{number}/model.pth")
        assert stored["model"]["weight"].item() == number


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip file"])
def test_files_that_are_no_checkpoints_say_so(tmp_path, content):
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match="file.pth"):
        misc.load_checkpoint(str(file))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}, torch.zeros(2)])
def test_checkpoints_without_weights_say_so(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match="not a checkpoint"):
        misc.load_checkpoint(str(tmp_path / "file.pth"))


def test_missing_and_unreachable_sources_say_so(tmp_path, server):
    for source in (str(tmp_path / "none.pth"), f"{server}/none.pth", "http://127.0.0.1:9/none.pth"):
        with pytest.raises(UserError, match="none.pth"):
            misc.load_checkpoint(source)

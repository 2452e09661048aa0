"""Checkpoints: their contents, safe loading, and the messages for checkpoints that are damaged or do not fit."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import models_load
import models_mae
import models_vit
from util import loop, misc, optim, rng
from util.amp import LossScaler
from util.checkpoint import weights
from util.errors import UserError
from util.misc import Position

CPU = torch.device("cpu")
ENCODER = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder(**changes):
    return models_mae.MaskedAutoencoderViT(**{**ENCODER, **DECODER, **changes})


def classifier(**changes):
    return models_vit.VisionTransformer(**{**ENCODER, "num_classes": 3, **changes})


def checkpoints(folder, network, optimizer, job="pretrain", scaler=None, class_to_idx=None, **args):
    args = {"model": "small", "batch_size": 2, "accum_iter": 1, "lr": None, "seed": 0, **args}
    return misc.Checkpoints(str(folder), job, network, optimizer, scaler or LossScaler("off", CPU), args, class_to_idx)


@pytest.fixture
def checkpoint(tmp_path):
    """Save a checkpoint after one update; return its path and the model."""
    model = autoencoder(norm_pix_loss=True)
    optimizer, scaler = optim.pretrain_optimizer(model, 1e-3, 0.05), LossScaler("off", CPU)
    scaler.backward(model(torch.randn(2, 3, 16, 16))[0])
    scaler.step(optimizer, model.parameters(), None)
    checkpoints(tmp_path, model, optimizer).save(Position(4), whole_epoch=True)
    return str(tmp_path / "checkpoint-4.pth"), model


def resume(path, network, **more):
    return checkpoints("", network, optim.pretrain_optimizer(network, 1.0, 0.5), **more).resume(path)


def test_our_checkpoints_open_without_an_allow_list_and_describe_themselves(checkpoint):
    path, model = checkpoint
    stored = torch.load(path, weights_only=True)
    assert {"model", "model_config", "optimizer", "scaler", "epoch", "args", "position", "rng", "job"} <= set(stored)
    assert type(stored["args"]) is dict and stored["model_config"]["model"] == "small" and stored["epoch"] == 4
    rebuilt = models_load.autoencoder_from_config(stored["model_config"])
    rebuilt.load_state_dict(stored["model"])
    assert rebuilt.norm_pix_loss and all(
        torch.equal(a, b) for a, b in zip(rebuilt.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_classifiers_keep_their_classes_and_rebuild(tmp_path):
    for probe in (False, True):
        model = classifier(global_pool=not probe)
        model = models_vit.make_linear_probe(model) if probe else model
        optimizer = optim.probe_optimizer(model, [0.1], 0.0)
        keeper = checkpoints(tmp_path, model, optimizer, "finetune", class_to_idx={"cat": 0, "dog": 1}, model="vit")
        keeper.save(Position(0), whole_epoch=True)
        stored = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
        assert stored["class_to_idx"] == {"cat": 0, "dog": 1}
        models_load.classifier_from_config(stored["model_config"]).load_state_dict(stored["model"])


def test_resume_brings_back_model_optimiser_and_epoch(checkpoint):
    path, model = checkpoint
    other = autoencoder()
    optimizer = optim.pretrain_optimizer(other, 1.0, 0.5)
    position = checkpoints("", other, optimizer).resume(path)
    assert (position.epoch, position.images) == (5, 0)
    assert torch.equal(other.mask_token, model.mask_token)
    assert optimizer.state[other.mask_token]["step"] == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [
        0.0,
        0.5,
    ]  # the flags' value, not the checkpoint's


def test_a_sweep_resumed_with_other_rates_trains_with_those(tmp_path):
    def probe(*blr):
        model = models_vit.make_linear_probe(classifier(), heads=2)
        return model, optim.probe_optimizer(model, list(blr), 0.0)

    checkpoints(tmp_path, *probe(0.1, 0.2), "linprobe", blr=[0.1, 0.2]).save(Position(0), whole_epoch=True)
    model, optimizer = probe(0.1, 0.8)
    keeper = checkpoints("", model, optimizer, "linprobe", blr=[0.1, 0.8])
    keeper.resume(str(tmp_path / "checkpoint-0.pth"), override=True)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert scales == [group["lr_scale"] for group in probe(0.1, 0.8)[1].param_groups] and max(scales) == 8


def test_a_checkpoint_that_was_moved_away_and_linked_is_still_of_its_folder(checkpoint, tmp_path):
    path, model = checkpoint
    (tmp_path / "log.txt").write_text("{}\n")
    (tmp_path / "disk").mkdir()
    Path(path).rename(tmp_path / "disk" / "big.pth")
    Path(path).symlink_to(tmp_path / "disk" / "big.pth")
    there = sorted(tmp_path.iterdir())
    checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1e-3, 0.05)).prepare(path)
    assert sorted(tmp_path.iterdir()) == there


def test_the_ema_starts_at_the_weights_that_a_run_starts_with(tmp_path):
    model, started = classifier(), classifier()
    ema = classifier()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    keeper = checkpoints("", started, optim.pretrain_optimizer(started, 1e-3, 0.05), "finetune")
    keeper.ema = ema
    keeper.resume(str(tmp_path / "weights.pth"))
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True))


def test_a_folder_that_changed_begins_its_epoch_anew(tmp_path, capsys):
    """Another number of images is shuffled differently, so that the epoch cannot be continued."""
    model = autoencoder()
    keeper = checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1e-3, 0.05))
    keeper.save(Position(3, images=64, dataset=200, totals={"loss": [1.0, 2.0]}), whole_epoch=False)
    for dataset, images in ((200, 64), (0, 64), (209, 0)):
        position = keeper.resume(str(tmp_path / "checkpoint-last.pth"), dataset=dataset)
        assert (position.epoch, position.images, bool(position.totals)) == (3, images, images > 0)
    assert "number of training images changed from 200 to 209: epoch 3 starts again" in capsys.readouterr().out


class Batches(list):
    device = CPU


def test_fewer_ranks_do_not_begin_in_the_midst_of_an_updates_batches(tmp_path):
    """All batches of an epoch that ended on 8 ranks are done, though 4 ranks could make one more.

    50,100 images make 195 batches on 8 ranks x 32 images x 4 accumulated batches, and 391 on 4 x 32 x 8.
    """
    model = classifier()
    keeper = checkpoints("", model, optim.pretrain_optimizer(model, 1e-3, 0.05), batch_size=128, accum_iter=8)

    def first_step(images):
        position = Position(0, images=images)
        settings = loop.RunSettings(1, 8, save_freq=1, save_minutes=0, eval_freq=1, max_bad_steps=1, max_bad_images=0.1)
        return loop.Run(Batches(range(391)), keeper, None, position, settings).first_step

    assert first_step(195 * 256) == 391
    assert first_step(48 * 4 * 256) == 384


def test_random_streams_come_back():
    state = rng.get_rng_state()
    drawn = torch.rand(1), np.random.rand(), random.random()
    rng.set_rng_state(state)
    assert drawn == (torch.rand(1), np.random.rand(), random.random())


def test_an_unfused_optimisers_state_steps_fused_here(checkpoint, tmp_path):
    """The reference's checkpoints hold fused: None, which loading their state would carry over."""
    path, _ = checkpoint
    stored = torch.load(path, weights_only=True)
    for group in stored["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(stored, tmp_path / "unfused.pth")
    model = autoencoder()
    optimizer = optim.pretrain_optimizer(model, 1.0, 0.5)
    checkpoints("", model, optimizer).resume(str(tmp_path / "unfused.pth"))
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_encoder_goes_into_a_classifier_of_another_grid(checkpoint, capsys):
    path, model = checkpoint
    vit = classifier(img_size=24)
    missing, surplus = weights.load_pretrained(path, vit)
    assert missing == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert "mask_token" in surplus and "norm.weight" in surplus
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert torch.equal(vit.pos_embed[:, 0], model.pos_embed[:, 0]) and vit.pos_embed.shape == (1, 37, 16)
    out = capsys.readouterr().out
    assert (
        "positions resized from 4 x 4 to 6 x 6 patches, for images of 24 x 24 pixels" in out
        and "new here: fc_norm.*, head.*;" in out
    )
    assert "decoder_blocks.*, decoder_embed.*, decoder_norm.*, decoder_pos_embed, decoder_pred.*, mask_token" in out


def test_encoder_only_files_and_bare_state_dicts_start_finetuning(checkpoint, tmp_path):
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)["model"]
    encoder = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask_token"))}
    for content in (encoder, {"model": encoder}):
        torch.save(content, tmp_path / "encoder.pth")
        _, surplus = weights.load_pretrained(str(tmp_path / "encoder.pth"), classifier())
        assert surplus == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "lacks blocks.1.attn.qkv.weight"),
        (lambda s: s.update({"blocks.2.norm1.weight": torch.zeros(16)}), "has no blocks.2.norm1.weight"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 8)}), r"cls_token is \[1, 1, 8\] in the file"),
    ],
)
def test_anything_unexpected_in_a_pretrained_file_is_an_error_that_names_it(checkpoint, tmp_path, spoil, named):
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)
    spoil(state["model"])
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=named):
        weights.load_pretrained(str(tmp_path / "bad.pth"), classifier())


@pytest.mark.parametrize(
    ("stored", "target", "named"),
    [
        ("mae_vit_base_patch16", classifier, "vit_base_patch16"),
        ("mae_vit_base_patch16_dec512d8b", classifier, "vit_base_patch16"),
        ("vit_base_patch16", autoencoder, "mae_vit_base_patch16"),
        ("mae_vit_base_patch16", autoencoder, "mae_vit_base_patch16"),
    ],
)
def test_an_encoder_of_another_size_names_the_model_that_has_it(checkpoint, tmp_path, capsys, stored, target, named):
    path, _ = checkpoint
    renamed = save_spoiled(path, tmp_path / "renamed.pth", lambda c: c["model_config"].update(model=stored))
    load = weights.load_pretrained if target is classifier else weights.load_initial
    capsys.readouterr()
    with pytest.raises(UserError, match=rf"\n  model: {named} in the file, vit_large here \(--model\)\n"):
        load(renamed, target(img_size=24, depth=3), {"model": "vit_large"})
    assert "resized" not in capsys.readouterr().out


def test_resuming_another_architecture_names_both_sides(checkpoint):
    path, _ = checkpoint
    with pytest.raises(
        UserError,
        match=r"does not fit: pass the flags(.|\n)*blocks: 2 in the file, 3 here .--model.\n  the file lacks blocks\.2",
    ):
        resume(path, autoencoder(depth=3))
    with pytest.raises(UserError, match=r"cls_token is \[1, 1, 16\] in the file and \[1, 1, 32\] in the model"):
        resume(path, autoencoder(embed_dim=32))
    with pytest.raises(
        UserError, match=r"model: small in the file, large here \(--model\)\n  encoder width: 16 in the file, 32 here"
    ):
        resume(path, autoencoder(embed_dim=32), model="large")
    with pytest.raises(UserError, match=r"attention heads: 2 in the file, 1 here \(--model\)"):
        resume(path, autoencoder(embed_dim=32, num_heads=1))


def test_another_shape_of_as_many_patches_is_refused(tmp_path):
    wide = classifier(img_size=(8, 32))
    optimizer = torch.optim.AdamW(wide.parameters())
    checkpoints(tmp_path, wide, optimizer).save(Position(), whole_epoch=True)
    tall = classifier(img_size=(32, 8))
    message = r"it has 2 x 8 patches, here are 8 x 2: pass --input_size 8 32"
    with pytest.raises(UserError, match=message):
        weights.load_for_eval(str(tmp_path / "checkpoint-0.pth"), tall, {}, [])
    with pytest.raises(UserError, match=message):
        checkpoints("", tall, torch.optim.AdamW(tall.parameters())).resume(str(tmp_path / "checkpoint-0.pth"))
    assert weights.load_pretrained(str(tmp_path / "checkpoint-0.pth"), tall)  # positions are resized


def test_entries_of_a_later_version_do_not_matter(checkpoint, tmp_path):
    path, _ = checkpoint
    later = save_spoiled(path, tmp_path / "later.pth", lambda c: c["position"].update(from_the_future=1))
    assert resume(later, autoencoder()).epoch == resume(path, autoencoder()).epoch


def test_weights_alone_say_how_their_images_were_prepared(checkpoint, tmp_path, capsys):
    path, _ = checkpoint

    def spoil(stored):
        del stored["optimizer"]
        stored["args"] |= {"mean": [0.1] * 3, "exif": True}

    bare = save_spoiled(path, tmp_path / "bare.pth", spoil)
    resume(bare, autoencoder(), mean=[0.5] * 3, exif=False)
    said = capsys.readouterr().out
    assert "was made with --mean [0.1, 0.1, 0.1], here" in said and "was made with --exif True, here" in said


def save_spoiled(path, target, spoil):
    stored = torch.load(path, weights_only=True)
    spoil(stored)
    torch.save(stored, target)
    return str(target)


def test_auto_goes_back_to_nothing_even_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = autoencoder()
    optimizer = optim.pretrain_optimizer(model, 1e-3, 0.05)
    assert not checkpoints(".", model, optimizer, resume="auto").goes_back
    assert checkpoints(".", model, optimizer, resume="checkpoint-0.pth").goes_back
    assert not checkpoints(".", model, optimizer, resume="checkpoint-last.pth").goes_back


def test_wrong_kinds_of_checkpoint_say_what_they_are_good_for(checkpoint, tmp_path):
    """A missing decoder, a wrong head, other classes or other pooling are named, with a remedy."""
    path, _ = checkpoint

    def no_decoder(stored):
        stored["model"] = {k: v for k, v in stored["model"].items() if not k.startswith("decoder")}

    file = save_spoiled(path, tmp_path / "encoder.pth", no_decoder)
    with pytest.raises(
        UserError,
        match=r"pass it as --init\n  kind: encoder, without head or decoder in the file, autoencoder",
    ):
        resume(file, autoencoder())

    vit = classifier()
    classes = {"a": 0, "c": 1, "d": 2}
    keeper = checkpoints(tmp_path, vit, optim.finetune_optimizer(vit, 1, 0, 1), "finetune", class_to_idx=classes)
    keeper.save(Position(7), whole_epoch=True)
    file, args = str(tmp_path / "checkpoint-7.pth"), {"model": "small"}
    for model, message in (
        (classifier(num_classes=5), r"classes: 3 in the file, 5 here \(--nb_classes\)"),
        (
            models_vit.make_linear_probe(classifier()),
            r"kind: classifier \(main_finetune.py\) in the file, probe \(main_lin",
        ),
        (classifier(global_pool=False), "pooling: mean of the patches in the file, class token here .--global_pool, "),
        (autoencoder(), r"kind: classifier \(main_finetune.py\) in the file, autoencoder"),
    ):
        with pytest.raises(UserError, match=message):
            weights.load_for_eval(file, model, args, [])
    with pytest.raises(
        UserError, match=r"pass it as --finetune\n  kind: autoencoder \(main_pretrain.py\) in the file, classifier"
    ):
        weights.load_for_eval(path, classifier(), args, [])
    with pytest.raises(UserError, match="it holds no classifier: train one first, with --finetune in main_finetune.py"):
        weights.load_for_eval(path, classifier(), {**args, "eval": True}, [])
    with pytest.raises(UserError, match="other classes.*only in .*checkpoint-7.pth: a, c, d; only in --data_path: b"):
        weights.load_for_eval(file, classifier(), args, ["b"])
    fresh = classifier()
    _, unused = weights.load_pretrained(file, fresh)
    assert unused == {"head.weight", "head.bias"} and not torch.equal(fresh.head.weight, vit.head.weight)


def test_a_flipped_byte_of_a_tensor_is_found(checkpoint):
    path, model = checkpoint
    data = bytearray(Path(path).read_bytes())
    middle = data.find(model.decoder_pred.weight.detach().numpy().tobytes()[:64]) + 10
    data[middle] ^= 1
    Path(path).write_bytes(data)
    taken = torch.load(path, weights_only=True)["model"]["decoder_pred.weight"]
    assert not torch.equal(taken, model.decoder_pred.weight), "PyTorch looks by itself now"
    with pytest.raises(UserError, match=r"is damaged: the checksum of its record \S+/data/\d+ is wrong. Take an"):
        misc.load_checkpoint(path)


def test_digests_of_earlier_versions_are_ignored_and_go_with_their_checkpoint(tmp_path):
    model = autoencoder()
    keeper = checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1.0, 0.5), keep=1)
    for epoch in range(2):
        keeper.save(Position(epoch), whole_epoch=True)
        for name in (epoch, "last"):
            (tmp_path / f"checkpoint-{name}.pth.sha256").write_text(f"{'0' * 64}  checkpoint-{name}.pth\n")
        misc.load_checkpoint(str(tmp_path / f"checkpoint-{epoch}.pth"))
    assert not (tmp_path / "checkpoint-0.pth.sha256").exists() and (tmp_path / "checkpoint-1.pth.sha256").exists()
    keeper.save(Position(1), whole_epoch=True)
    assert not list(tmp_path.glob("*.sha256"))


def test_keep_leaves_the_newest_and_the_best(tmp_path):
    model = autoencoder()
    keeper = checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1.0, 0.5), keep=2)
    for epoch in range(12):
        keeper.save(Position(epoch, best_epoch=min(epoch, 3)), whole_epoch=True)
    kept = {f"checkpoint-{name}.pth" for name in (3, 10, 11, "last")}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_run_that_went_back_keeps_its_own_checkpoints(tmp_path):
    model = autoencoder()
    keeper = checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1.0, 0.5), keep=2)
    for epoch in (6, 7, 8, 3, 4, 5):
        keeper.save(Position(epoch, branch=int(epoch < 6)), whole_epoch=True)
    left = {f"checkpoint-{name}.pth" for name in (4, 5, 7, 8, "last")}
    assert {path.name for path in tmp_path.glob("*.pth")} == left
    assert misc.resolve_resume("auto", str(tmp_path), "pretrain", "small").endswith("checkpoint-last.pth")
    (tmp_path / "checkpoint-last.pth").unlink()
    assert misc.resolve_resume("auto", str(tmp_path), "pretrain", "small").endswith("checkpoint-5.pth")


def test_with_another_effective_batch_the_epoch_starts_again(tmp_path, capsys):
    model = autoencoder()
    optimizer = optim.pretrain_optimizer(model, 1.0, 0.5)
    checkpoints(tmp_path, model, optimizer).save(Position(1, images=10, totals={"loss": [5.0, 5.0]}), whole_epoch=False)
    keeper = checkpoints("", model, optimizer, batch_size=4, accum_iter=2)
    position = keeper.resume(str(tmp_path / "checkpoint-last.pth"), override=True)
    assert position.epoch == 1 and position.images == 0 and position.totals == {}
    assert "batch size changed: epoch 1 starts again" in capsys.readouterr().out


def test_flags_that_differ_are_listed_and_another_schedule_is_refused(checkpoint, capsys):
    path, _ = checkpoint
    model = autoencoder()
    resume(path, model, mask_ratio=0.5, lr=None)
    resume(path, model, model="small", clip_grad=1.0, keep=7)
    assert "flags that differ" not in capsys.readouterr().out
    for change, message in ((("seed", 1), "--seed 0 -> 1"), (("batch_size", 4), "effective batch 2 -> 4")):
        with pytest.raises(UserError, match=message):
            resume(path, model, **dict([change]))
    keeper = checkpoints("", model, optim.pretrain_optimizer(model, 1.0, 0.5), seed=1)
    assert keeper.resume(path, override=True).epoch == 5
    assert "differ from the checkpoint's: --seed 0 -> 1" in capsys.readouterr().out


def test_another_number_of_processes_is_told_the_batch_that_makes_up_for_it(checkpoint, monkeypatch):
    path, _ = checkpoint
    monkeypatch.setattr(misc.dist, "world_size", lambda: 2)
    remedy = r"effective batch 2 -> 4.*made with \(it had 1 processes, here are 2: --batch_size 1\), or"
    with pytest.raises(UserError, match=remedy):
        resume(path, autoencoder())
    with pytest.raises(UserError, match=r"made with, or"):  # no batch size makes up for that
        resume(path, autoencoder(), accum_iter=3)


class Hostile:
    """Object that creates a file when it is unpickled in the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("over_http", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, server, over_http):
    marker, file = tmp_path / "marker", tmp_path / "hostile.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": Hostile(marker)}, file)
    with pytest.raises(UserError, match="refused: it holds _?io.open, and loading it could run code"):
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


def test_an_address_of_safetensors_is_read(tmp_path, server):
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert misc.load_checkpoint(f"{server}/model.safetensors")["model"]["weight"].item() == 1


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_download_that_was_cut_off_is_not_kept(name, tmp_path, server):
    if name.endswith(".pth"):
        torch.save({"weight": torch.ones(1000)}, tmp_path / name)
    else:
        save_file({"weight": torch.ones(1000)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:2000])
    with pytest.raises(UserError, match=name):
        misc.load_checkpoint(f"{server}/{name}")
    (tmp_path / name).write_bytes(whole)
    assert misc.load_checkpoint(f"{server}/{name}")["model"]["weight"].sum() == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole PyTorch checkpoint: .*or download the file again"),
        (b"\n <html>not found</html>", "a web page, no checkpoint"),
        (b"{'a': 1}", "not a checkpoint of plain types"),
        (b"PK\x03\x04 half a zip file", "not a (whole PyTorch )?checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints_say_so(tmp_path, content, message):
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"file.pth is {message}"):
        misc.load_checkpoint(str(file))


def test_a_folder_of_another_kind_is_told_what_it_lacks(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    with pytest.raises(UserError, match="is a folder without weights that can be read here.*ONNX"):
        misc.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}, torch.zeros(2)])
def test_checkpoints_without_weights_say_so(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match="not a checkpoint"):
        misc.load_checkpoint(str(tmp_path / "file.pth"))


def test_missing_and_unreachable_sources_say_so(tmp_path, server):
    for source in (str(tmp_path / "none.pth"), f"{server}/none.pth", "http://127.0.0.1:9/none.pth"):
        with pytest.raises(UserError, match="none.pth"):
            misc.load_checkpoint(source)


def test_a_resumed_run_keeps_the_precision_that_was_chosen_for_it(tmp_path, monkeypatch):
    """On a CPU --amp auto depends on a measurement, which could come out differently at the next start."""
    model = autoencoder()
    optimizer, here = optim.pretrain_optimizer(model, 1.0, 0.5), {"amp": "auto", "device": "cpu"}
    checkpoints(tmp_path, model, optimizer, scaler=LossScaler("bf16", CPU), **here).save(Position(0), whole_epoch=True)
    monkeypatch.setattr("util.amp.bf16_is_faster_on_cpu", lambda: False)
    for flags, kept in ((here, "bf16"), ({**here, "device": "cuda"}, "off"), ({**here, "amp": "off"}, "off")):
        scaler = LossScaler("auto", CPU)
        checkpoints("", model, optimizer, scaler=scaler, **flags).resume(str(tmp_path / "checkpoint-0.pth"))
        assert scaler.amp == kept and (scaler.dtype == torch.bfloat16) == (kept == "bf16")


@pytest.mark.parametrize("clock", [(2000.0, 1000.0, 500.0), (1000.0, 3000.0, 2000.0), (5.0, 5.0, 5.0)])
def test_the_newest_checkpoint_is_that_of_most_progress_whatever_the_clocks_say(clock, tmp_path, monkeypatch):
    """Machines whose clocks differ take turns: the run goes on from where the last one of them was."""
    model = autoencoder()
    keeper = checkpoints(tmp_path, model, optim.pretrain_optimizer(model, 1.0, 0.5))
    for position, now in zip((Position(3), Position(4), Position(5, images=8)), clock, strict=True):
        monkeypatch.setattr(misc.time, "time", lambda now=now: now)
        keeper.save(position, whole_epoch=not position.images)
    assert misc.resolve_resume("auto", str(tmp_path), "pretrain", "small").endswith("checkpoint-last.pth")
    (tmp_path / "checkpoint-last.pth").unlink()
    assert misc.resolve_resume("auto", str(tmp_path), "pretrain", "small").endswith("checkpoint-4.pth")

"""Several ranks: they compute the same as one, and none waits for ever."""

import os
import shutil
import sys
import time
from pathlib import Path

import faults
import pytest
import ranks
import torch
from conftest import SAMPLES, link_images
from runs import finish, job_argv, same, state
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import engine_finetune
import engine_pretrain
import main_pretrain
import models_mae
import models_vit
from util import amp, checks, lock, loop, misc, optim
from util.amp import LossScaler
from util.data import datasets, loaders, splits
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import CentreCrop, Crop
from util.distributed import dist, signals
from util.errors import UserError
from util.lr_sched import CosineSchedule
from util.report.log import RunLog
from util.report.monitor import FixedMasks, Monitor
from util.report.scores import Evaluation
from util.updater import Updater

CPU = torch.device("cpu")


class MasksFromImages(models_mae.MaskedAutoencoderViT):
    """Autoencoder whose masks depend on the images alone, not on their distribution over batches and ranks."""

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        return super().forward(imgs, mask_ratio, (self.patchify(imgs).mean(dim=2) * 997) % 1)


def build_model(job):
    torch.manual_seed(0)
    if job == "pretrain":
        return MasksFromImages(**models_mae.MODELS["mae_vit_demo_patch4"].keywords | {"img_size": 28})
    model = models_vit.MODELS["vit_demo_patch4"](img_size=28, num_classes=5, global_pool=True)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # with weights of zero the encoder would get no gradient
    return model


def batches_of_rank(updates, accum):
    """Return this rank's share of `updates` global batches of 12 images, each in `accum` micro-batches."""
    draw = torch.Generator().manual_seed(1)
    imgs = torch.randn(updates, 12, 3, 28, 28, generator=draw)
    targets = torch.randint(5, (updates, 12), generator=draw)
    share = slice(dist.rank(), None, dist.world_size())
    return [
        part
        for update in range(updates)
        for part in zip(imgs[update][share].chunk(accum), targets[update][share].chunk(accum), strict=True)
    ]


def train(job, model, loader, optimizer, epoch=0, accum=1):
    schedule = CosineSchedule(optimizer.param_groups[0]["lr"], 0.0, 0, 20)
    updater = Updater(model, optimizer, schedule, LossScaler("off", CPU), accum_iter=accum)
    if job == "pretrain":
        return engine_pretrain.train_one_epoch(model, loader, updater, epoch)
    return engine_finetune.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, updater, epoch)


def gradients_of_one_update(job, accum=1):
    """Return the gradients of one update, read off a step of SGD with a learning rate of 1, and its loss."""
    model = build_model(job)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = dist.wrap(model, CPU, static_graph=accum == 1)
    stats = train(job, wrapped, batches_of_rank(1, accum), torch.optim.SGD(model.parameters(), lr=1.0), accum=accum)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, stats["loss"]


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_gradients_of_several_ranks_are_those_of_one(job, tmp_path):
    """Two ranks, three ranks, and two that accumulate agree with one process on the same images and masks."""
    gradients, loss = gradients_of_one_update(job)
    scale = max(g.abs().max() for g in gradients.values())
    for name, world, accum in (("alone", 1, 3), ("two", 2, 1), ("three", 3, 1), ("accumulating", 2, 3)):
        for theirs, their_loss in ranks.run(world, tmp_path / name, gradients_of_one_update, job, accum):
            assert their_loss == pytest.approx(loss, rel=1e-6), name
            for key, gradient in gradients.items():
                assert (theirs[key] - gradient).abs().max() <= 2e-6 * scale, (name, key)


def count_gradient_buffers():
    """Return the number of gradients amid an accumulation, and that of the memory buffers that hold them."""
    model = build_model("pretrain")
    wrapped = dist.wrap(model, CPU)
    train("pretrain", wrapped, batches_of_rank(2, 2), optim.pretrain_optimizer(model, 1e-3, 0.05), accum=2)
    with dist.grad_sync(wrapped, False):
        wrapped(batches_of_rank(1, 2)[0][0])[0].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return len(grads), len({grad.untyped_storage().data_ptr() for grad in grads})


def test_accumulation_keeps_no_gradients_beside_ddps_buckets(tmp_path):
    for gradients, pieces in ranks.run(2, tmp_path, count_gradient_buffers):
        assert gradients > 50 and pieces < 5


def loss_curve():
    """Return the loss of each of 20 steps of AdamW."""
    model = build_model("pretrain")
    wrapped = dist.wrap(model, CPU, static_graph=True)
    optimizer = optim.pretrain_optimizer(model, 1e-3, 0.05)
    loader = batches_of_rank(20, 1)
    return [train("pretrain", wrapped, [loader[step]], optimizer, epoch=step)["loss"] for step in range(20)]


def test_two_ranks_follow_the_loss_curve_of_one(tmp_path):
    alone = loss_curve()
    assert alone[-1] < 0.9 * alone[0]
    for curve in ranks.run(2, tmp_path, loss_curve):
        assert curve == pytest.approx(alone, rel=1e-5)


def best_of_differing_accuracies(images, folder):
    """Run three epochs whose accuracy differs between the ranks; return the best one that this rank has recorded."""
    model = build_model("finetune")
    args = {"model": "vit_demo_patch4", "batch_size": 4, "accum_iter": 1, "keep": None}
    optimizer = optim.pretrain_optimizer(model, 1e-3, 0.05)
    keeper = misc.Checkpoints(str(folder), "finetune", model, optimizer, LossScaler("off", CPU), args)
    keeper.prepare("")
    loader = loaders.train_loader(
        DataSpec(str(images)), Crop(28, (1.0, 1.0)), PixelSpec(), loaders.Loading(4, 0, False, 0, CPU)
    )
    position = misc.Position(0)
    settings = loop.RunSettings(3, 1, save_freq=100, save_minutes=0, eval_freq=1, max_bad_steps=1, max_bad_images=1.0)
    loop.Run(loader, keeper, RunLog("", "", 0, 0.0), position, settings).fit(
        train=lambda epoch: {"loss": 1.0},
        evaluate=lambda epoch, poll: {"acc1": 50.0 - dist.rank() * (-1) ** epoch},
    )
    return position.best


def test_ranks_whose_accuracies_differ_agree_on_the_best(images, tmp_path):
    """Otherwise a rank would wait alone for the others to save the best checkpoint."""
    assert ranks.run(2, tmp_path, best_of_differing_accuracies, images, tmp_path / "run") == [50.0, 50.0]


def monitor_stats(data):
    """Return the figures of pre-training's monitor, whose masks follow from the file names."""
    train = datasets.open_split(datasets.Images, DataSpec(str(data)), "train", None, PixelSpec(), classes_optional=True)
    views = loaders.monitor_loaders(DataSpec(str(data)), train, CentreCrop(28), loaders.Loading(4, 0, False, 0, CPU))
    watch = Monitor(*views, "", RunLog("", "", 0, 0.0), LossScaler("off", CPU), FixedMasks(0.75, "random", 0))
    return watch(build_model("pretrain"), 0, lambda: None)


def test_fewer_images_than_ranks_can_be_watched(images, tmp_path):
    for split in ("train", "val"):
        link_images(images / split, tmp_path / split, classes=2, count=1)
    alone = monitor_stats(tmp_path)
    assert set(alone) == {"loss", "knn"}
    for stats in ranks.run(3, tmp_path / "out", monitor_stats, tmp_path):
        assert stats == pytest.approx(alone, rel=1e-5)


def error_of_evaluation(root):
    images = datasets.open_split(
        datasets.EvalImages, DataSpec(str(root.parent)), "val", CentreCrop(28, 1.0), PixelSpec()
    )
    loader = loaders.eval_loader(images, loaders.Loading(2, 0, False, 0, CPU), distributed=True)
    poll = signals.Requests(save_minutes=0).poll
    try:
        engine_finetune.evaluate(
            build_model("finetune"), loader, CPU, LossScaler("off", CPU), Evaluation(distributed=True), poll
        )
    except UserError as error:
        return str(error)


def test_a_bad_image_that_one_rank_meets_is_every_ranks_error(images, tmp_path):
    """Of 15 images the first is bad, which one rank reads; the other must not wait for it."""
    link_images(images / "val", tmp_path / "val", classes=5)  # as many classes as the model has
    bad = sorted((tmp_path / "val").glob("*/*"))[0]
    bad.unlink()
    bad.write_bytes(b"")
    said = ranks.run(2, tmp_path / "out", error_of_evaluation, tmp_path / "val")
    assert said[0] == said[1] and str(bad) in said[0]


def pauses_before_a_fork():
    """Fork, and return for how many seconds that slept."""
    slept, sleep = [], time.sleep
    time.sleep = slept.append
    try:
        child = os.fork()
    finally:
        time.sleep = sleep
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return slept


@pytest.mark.skipif(sys.version_info >= (3, 11, 10), reason="CPython's issue 112275 is mended there")
def test_forks_wait_for_gloos_threads(tmp_path):
    """A process that is forked while such a thread enters Python would never start."""
    assert ranks.run(2, tmp_path, pauses_before_a_fork) == [[0.02], [0.02]]


def save_requests_after_an_hour():
    """Poll four times, an hour after the last checkpoint; return for each poll whether to save."""
    requests, answers = signals.Requests(save_minutes=30), []
    requests.saved -= 3600
    for _ in range(4):
        answers.append(requests.poll()[1])
        if answers[-1]:
            requests.save_done()
    return answers


def test_the_clock_asks_once_for_a_checkpoint(tmp_path):
    assert ranks.run(2, tmp_path, save_requests_after_an_hour) == [[False, True, False, False]] * 2


def count_exchanged_numbers(accum):
    """Return the count of numbers exchanged in 3 updates of `accum` micro-batches, and that of the parameters."""
    model, sent = build_model("pretrain"), []
    wrapped = dist.wrap(model, CPU, static_graph=accum == 1)

    def counting(group, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, counting)
    train("pretrain", wrapped, batches_of_rank(3, accum), torch.optim.SGD(model.parameters(), lr=0.1), accum=accum)
    return sum(sent), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("accum", [1, 3])
def test_gradients_are_exchanged_once_per_update(accum, tmp_path):
    for sent, size in ranks.run(2, tmp_path, count_exchanged_numbers, accum):
        assert sent == 3 * size


def evaluate_split(root):
    images = datasets.open_split(
        datasets.EvalImages, DataSpec(str(root.parent)), "val", CentreCrop(28, 1.0), PixelSpec()
    )
    loader = loaders.eval_loader(images, loaders.Loading(8, 0, False, 0, CPU), distributed=True)
    return len(images), engine_finetune.evaluate(
        build_model("finetune"), loader, CPU, LossScaler("off", CPU), Evaluation(distributed=True)
    )


def test_101_images_give_the_same_counts_on_one_two_and_three_ranks(tmp_path):
    link_images(SAMPLES / "val", tmp_path / "val", classes=5, count=20)
    first = min((SAMPLES / "val").iterdir())
    (tmp_path / "val" / first.name / "101.png").symlink_to(sorted(first.iterdir())[20])
    total, alone = evaluate_split(tmp_path / "val")
    assert total == 101
    for world in (2, 3):
        for _, shared in ranks.run(world, tmp_path / str(world), evaluate_split, tmp_path / "val"):
            assert shared["acc1"] == alone["acc1"] and shared["acc5"] == alone["acc5"]
            assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def message_of_a_full_disk(folder):
    """Return the error of a line of log.txt that rank 0 can't write."""
    logs = RunLog(str(folder), "", 0, 0.0)
    if logs.file:
        logs.file = Path("/dev/full")
    try:
        logs.write_epoch({"epoch": 0})
    except UserError as error:
        return str(error)


def test_a_log_that_cannot_be_written_is_every_ranks_error(tmp_path):
    messages = ranks.run(2, tmp_path / "out", message_of_a_full_disk, tmp_path)
    assert messages[0] == messages[1] and messages[0].startswith("cannot write /dev/full: No space left")


def message_of_other_flags(folder, own_flags):
    """Check the ranks' flags together; rank 1 has flags of its own."""
    argv = ["--data_path", str(folder), "--output_dir", str(folder / "run"), "--batch_size", "8"]
    args = main_pretrain.get_args(argv + (own_flags if dist.rank() else []))
    try:
        checks.check_together(args)
    except UserError as error:
        return str(error)


def test_ranks_with_other_flags_are_refused_on_every_rank(tmp_path):
    messages = ranks.run(2, tmp_path / "other", message_of_other_flags, tmp_path, ["--batch_size", "4"])
    assert messages[0] == messages[1]
    assert "rank 1 was started with --batch_size 4, rank 0 with --batch_size 8: start all" in messages[0]
    assert ranks.run(2, tmp_path / "own", message_of_other_flags, tmp_path, ["--num_workers", "3"]) == [None, None]


@pytest.mark.parametrize("flag", ["--data_path", "--init"])
def test_ranks_with_other_files_are_refused(flag, tmp_path):
    said = ranks.run(2, tmp_path / "other", message_of_other_flags, tmp_path, [flag, "elsewhere"])
    assert f"rank 1 was started with {flag} elsewhere" in said[0]


def precision_of_ranks(supported):
    """Return the precision that a rank chooses whose GPU computes in bf16 or does not."""
    torch.cuda.is_bf16_supported = lambda including_emulation: supported[dist.rank()]
    return amp.choose("auto", torch.device("cuda"))


def test_all_ranks_train_in_the_same_precision(tmp_path):
    assert ranks.run(2, tmp_path / "mixed", precision_of_ranks, [True, False]) == ["fp16", "fp16"]
    assert ranks.run(2, tmp_path / "alike", precision_of_ranks, [True, True]) == ["bf16", "bf16"]


def warning_of_another_folder(folder):
    """Lock output_dir on rank 0, of which rank 1 sees another folder of the same path, as if it were not shared."""
    said, dist.print_rank0 = [], lambda message: said.append(message)
    if dist.rank():
        os.chdir(folder / "elsewhere")
    else:
        os.chdir(folder)
    argv = ["--data_path", str(folder), "--output_dir", "run", "--dist_timeout", "0.02"]  # rank 1 looks for half of it
    checks.check_together(main_pretrain.get_args(argv))
    dist.all_gather(None)
    return said if dist.rank() == 0 else lock.lock_folder(str(folder / "run"))


def test_an_output_dir_that_is_not_shared_is_warned_of(tmp_path):
    # There an earlier run has left its lock file.
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere" / "run" / lock.LOCK).write_text("process 1 on another machine")
    start = time.monotonic()
    said, holder = ranks.run(2, tmp_path / "out", warning_of_another_folder, tmp_path)
    assert time.monotonic() - start < 50, "the rank looked for the folder for longer than the others wait"
    assert len(said) == 1 and "--output_dir run of rank 1 is another folder than rank 0's" in said[0]
    assert holder.startswith("process ")  # rank 0 still has its lock
    shutil.rmtree(tmp_path / "elsewhere" / "run")
    (tmp_path / "elsewhere" / "run").symlink_to(tmp_path / "run")
    assert ranks.run(2, tmp_path / "again", warning_of_another_folder, tmp_path)[0] == []


def draw_random_numbers():
    return [torch.rand(1).item() for _ in range(100)]


def test_no_rank_repeats_anothers_random_numbers(tmp_path):
    numbers = sum(ranks.run(3, tmp_path, draw_random_numbers), [])
    assert len(set(numbers)) == 300


def count_listed_files(root):
    if dist.rank():
        splits.list_split = lambda *_: pytest.fail("walked by another rank than 0")
    return len(datasets.open_split(datasets.Images, DataSpec(root), "train", CentreCrop(28), PixelSpec()))


def test_only_rank_0_lists_the_files(images, tmp_path):
    assert ranks.run(3, tmp_path, count_listed_files, str(images)) == [80, 80, 80]


def optimizer_bytes(shard):
    model = build_model("pretrain")
    optimizer = optim.pretrain_optimizer(model, 1e-3, 0.05, shard)
    train("pretrain", dist.wrap(model, CPU, static_graph=True), batches_of_rank(2, 1), optimizer)
    states = dist.local_optimizer(optimizer).state.values()
    return sum(value.numel() * 4 for one in states for value in one.values())


def test_sharding_spreads_the_optimisers_memory(tmp_path):
    (whole,) = ranks.run(1, tmp_path / "1", optimizer_bytes, True)
    shares = ranks.run(3, tmp_path / "3", optimizer_bytes, True)
    assert sum(shares) == whole and max(shares) < 0.4 * whole


@pytest.mark.slow
def test_sharded_runs_end_as_others_and_their_checkpoints_fit_anywhere(images, tmp_path):
    """Runs with and without --shard end with the same bits, and resume from each other's files, also on one rank."""
    small = ["--batch_size", 4, "--num_workers", 0, "--epochs", 2]
    ends = {}
    for name, more in (("plain", []), ("shard", ["--shard"])):
        faults.run_ranks("pretrain", job_argv(images, tmp_path / name, *small, *more), tmp_path)
        ends[name] = state(tmp_path / name)
    assert same(ends["plain"]["model"], ends["shard"]["model"])
    assert same(ends["plain"]["optimizer"], ends["shard"]["optimizer"])
    on = ["--epochs", 3, "--resume_override", "--resume"]
    for name, more, before in (("plain_on", ["--shard"], "plain"), ("shard_on", [], "shard")):
        argv = job_argv(images, tmp_path / name, *small, *more, *on, tmp_path / before / "checkpoint-1.pth")
        faults.run_ranks("pretrain", argv, tmp_path)
    assert same(state(tmp_path / "plain_on")["model"], state(tmp_path / "shard_on")["model"])
    small[1] = 8
    (tmp_path / "alone").mkdir()
    finish(images, tmp_path / "alone", *small, *on, tmp_path / "shard" / "checkpoint-1.pth")
    assert state(tmp_path / "alone")["epoch"] == 2


def test_a_process_that_stays_away_is_an_error_in_time(images, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29653"}
    start = time.time()
    process = faults.start(
        "pretrain", job_argv(images, tmp_path / "o", "--dist_timeout", 0.05), tmp_path / "out", env=env
    )
    assert faults.exit_code(process) == 1 and time.time() - start < 30
    said = (tmp_path / "out").read_text()
    assert (
        "rank 0 of 2 could not join the process group at 127.0.0.1:29653 within 3 s" in said and "Traceback" not in said
    )


def test_a_rank_that_hangs_ends_the_others_with_a_message(images, tmp_path):
    argv = job_argv(images, tmp_path / "o", "--dist_timeout", 0.1, "--num_workers", 0)
    processes = faults.start_ranks("pretrain", argv, tmp_path / "out", ("hang", 1, 3))
    try:
        assert faults.exit_code(processes[0], 60) == 1
        said = (tmp_path / "out-0").read_text()
        assert "rank 0 lost another process" in said and "imed out" in said and "Traceback" not in said
    finally:
        processes[1].kill()

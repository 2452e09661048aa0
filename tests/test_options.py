"""Flags: names and defaults are the reference's; all problems are reported at once, before anything is read."""

import re
import time

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
import main_reconstruct
import models_mae
import models_vit
from util import checks, misc, options, speed
from util.errors import UserError

JOBS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
MODELS = {"pretrain": models_mae.MODELS, "finetune": models_vit.MODELS, "linprobe": models_vit.MODELS}

SHARED = {
    "accum_iter": 1,
    "lr": None,
    "output_dir": "./output_dir",
    "log_dir": "./output_dir",
    "seed": 0,
    "resume": "",
    "start_epoch": 0,
    "num_workers": 10,
    "pin_mem": True,
    "world_size": 1,
    "local_rank": -1,
    "dist_on_itp": False,
    "dist_url": "env://",
    "input_size": 224,
}
CLASSIFIER = {"finetune": "", "nb_classes": 1000, "eval": False, "dist_eval": False, "crop_scale": (0.08, 1.0)}
DEFAULTS = {
    "pretrain": SHARED
    | {
        "batch_size": 64,
        "epochs": 400,
        "warmup_epochs": 40,
        "model": "mae_vit_large_patch16",
        "crop_scale": (0.2, 1.0),
        "mask_ratio": 0.75,
        "norm_pix_loss": False,
        "weight_decay": 0.05,
        "blr": 1e-3,
        "min_lr": 0,
    },
    "finetune": SHARED
    | CLASSIFIER
    | {
        "batch_size": 64,
        "epochs": 50,
        "warmup_epochs": 5,
        "model": "vit_large_patch16",
        "weight_decay": 0.05,
        "blr": 1e-3,
        "min_lr": 1e-6,
        "drop_path": 0.1,
        "layer_decay": 0.75,
        "clip_grad": None,
        "color_jitter": None,
        "aa": "rand-m9-mstd0.5-inc1",
        "smoothing": 0.1,
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "resplit": False,
        "mixup": 0,
        "cutmix": 0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
        "global_pool": True,
    },
    "linprobe": SHARED
    | CLASSIFIER
    | {
        "batch_size": 512,
        "epochs": 90,
        "warmup_epochs": 10,
        "model": "vit_large_patch16",
        "weight_decay": 0,
        "blr": 0.1,
        "min_lr": 0,
        "global_pool": False,
    },
}


@pytest.mark.parametrize("job", JOBS)
def test_defaults_are_the_references(job):
    args = vars(JOBS[job].get_args([]))
    assert {name: args[name] for name in DEFAULTS[job]} == DEFAULTS[job]


@pytest.mark.parametrize("job", ["finetune", "linprobe"])
def test_pooling_flags(job):
    get_args = JOBS[job].get_args
    assert get_args(["--global_pool"]).global_pool and not get_args(["--cls_token"]).global_pool


@pytest.mark.parametrize("bounds", [["0.2"], ["0.2", "0.8"]])
def test_cutmix_takes_one_or_two_bounds(bounds):
    args = main_finetune.get_args(["--cutmix_minmax", *bounds])
    assert args.cutmix_minmax == [float(bound) for bound in bounds] and options.mixes(args)


def test_tensorboard_follows_the_output_unless_told():
    assert main_pretrain.get_args(["--output_dir", "here"]).log_dir == "here"
    assert main_pretrain.get_args(["--output_dir", "here", "--log_dir", "there"]).log_dir == "there"


BAD = [
    ("pretrain", "--model vit_base_patch16", "choose one of mae_vit_base_patch16_dec512d8b"),
    ("pretrain", "--input_size 225", "not a multiple of the patch size, 16"),
    ("pretrain", "--input_size 28 --patch_size 8", "not a multiple of the patch size, 8"),
    (
        "pretrain",
        "--model mae_vit_demo_patch4 --patch_size 1 --input_size 8 --in_chans 1 --norm_pix_loss",
        "a patch of one value has no variance",
    ),
    ("pretrain", "--dist_timeout 1e10", "--dist_timeout 10000000000.0 must be greater than 0, and at most 1000000"),
    ("pretrain", "--mask_ratio 1", "keep and remove at least one"),
    ("pretrain", "--mask_ratio 0", "keep and remove at least one"),
    ("pretrain", "--mask_ratio 0.999", "must keep and remove at least one of 196"),
    ("pretrain", "--batch_size 0", "--batch_size 0 must be at least 1"),
    ("pretrain", "--accum_iter 0", "--accum_iter 0 must be at least 1"),
    ("pretrain", "--epochs 10", "less than --epochs 10: pass a smaller one, such as --warmup_epochs 1"),
    ("pretrain", "--resume nowhere.pth", "--resume nowhere.pth: no such file"),
    ("pretrain", "--crop_scale 0.5 0.2", "--crop_scale 0.5 0.2"),
    ("finetune", "--finetune nowhere.pth", "--finetune nowhere.pth: no such file"),
    ("finetune", "--eval", "--eval needs --resume"),
    ("finetune", "--mixup 0.8 --batch_size 3", "must be even"),
    ("linprobe", "--model mae_vit_base_patch16", "choose one of vit_demo_patch4"),
    ("pretrain", "--dist_on_itp", "OMPI_COMM_WORLD_RANK is not set"),
    ("linprobe", "--weight_decay -1", "must be at least 0 and finite"),
    ("linprobe", "--nb_classes 0", "--nb_classes 0 must be at least 1"),
    ("pretrain", "--keep 0", "--keep 0 must be at least 1"),
    ("pretrain", "--save_minutes -1", "must be at least 0 and finite"),
    ("pretrain", "--max_bad_images 2", "must lie between 0 and 1"),
    ("pretrain", "--max_bad_steps 0", "must be at least 1"),
    ("pretrain", "--lr nan", "--lr nan must be at least 0 and finite"),
    ("pretrain", "--clip_grad 0", "must be greater than 0"),
    ("pretrain", "--patch_size 0", "--patch_size 0 must be at least 1"),
    ("pretrain", "--device gpu", "--device gpu is unknown: choose cuda, mps or cpu"),
    ("pretrain", "--device meta", "choose cuda, mps or cpu"),
    ("pretrain", "--resume auto --output_dir=", "looks for checkpoints in --output_dir, which is ''"),
    ("pretrain", "--output_dir pyproject.toml", "can't be written to: .*pyproject.toml is a file"),
    ("pretrain", "--output_dir pyproject.toml/run", "can't be written to: .*pyproject.toml is a file"),
    ("pretrain", "--output_dir /proc/run", "--output_dir /proc/run can't be written to"),
    ("pretrain", "--log_dir /proc/run", "--log_dir /proc/run can't be written to"),
    ("finetune", "--aa wrong-m9", "--aa wrong-m9 is not a policy of timm"),
    ("finetune", "--drop_path 1", "must be at least 0 and less than 1"),
    ("finetune", "--smoothing 1", "must be at least 0 and less than 1"),
    ("finetune", "--layer_decay 0", "must be greater than 0"),
    ("finetune", "--reprob 1.5", "must lie between 0 and 1"),
    ("finetune", "--cutmix_minmax 0.5", "needs two numbers"),
    ("pretrain", "--mean nan 0 0 --std 1 1 1", "--mean nan 0.0 0.0: must be finite"),
    ("pretrain", "--mean 0 0 0 --std inf 1 1", "--std inf 1.0 1.0: must be greater than 0 and finite"),
    ("pretrain", "--mean 0 0 0 --std 1 1 1e-45", "must be greater than 0 and finite"),
    ("finetune", "--cutmix_minmax 0.5 0.501", "no length in pixels is in between"),
    ("finetune", "--crop_pct 0", "must be at least 0.01"),
    ("finetune", "--confusion /", "--confusion / can't be written to: it is a folder"),
]


@pytest.mark.parametrize(("job", "flags", "message"), BAD)
def test_bad_arguments(job, flags, message):
    args = JOBS[job].get_args([*flags.split(), "--data_path", "x"])
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        checks.check(args, MODELS[job])
    assert time.perf_counter() - start < 1
    assert re.search(message, str(caught.value)) and "--data_path x: no such folder" in str(caught.value)


def test_a_confusion_matrix_replaces_no_input(tmp_path):
    file = tmp_path / "checkpoint-0.pth"
    file.write_bytes(b"weights")
    args = main_finetune.get_args(["--data_path", "x", "--eval", "--resume", str(file), "--confusion", str(file)])
    with pytest.raises(UserError, match=f"--confusion {file} is one of the inputs, and would be replaced"):
        checks.check(args, MODELS["finetune"])
    table = tmp_path / "val" / "a" / "1.png"
    args = main_finetune.get_args(["--data_path", str(tmp_path), "--confusion", str(table)])
    with pytest.raises(UserError, match=f"--confusion {table} lies among the images of --data_path"):
        checks.check(args, MODELS["finetune"])


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("pretrain", "--amp fp8"),
        ("pretrain", "--batchsize 8"),
        ("pretrain", "--epochs ten"),
        ("finetune", "--mixup_mode half"),
        ("finetune", "--remode blur"),
    ],
)
def test_what_argparse_refuses_names_the_flag(job, flags, refusal):
    said = refusal(lambda: JOBS[job].get_args(flags.split()))
    assert flags.split()[0] in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--modle x", "unknown flag --modle: did you mean --model? --help lists all flags"),
        (
            "--lerning_rate=3 --batchsize 8",
            "unknown flag --lerning_rate, --batchsize: did you mean --batch_size? --help",
        ),
        ("--zzz", "unknown flag --zzz. --help lists all flags"),
        ("folder", "unknown argument folder. --help"),
    ],
)
def test_a_flag_that_does_not_exist_is_named_with_the_one_that_was_meant(flags, said, refusal):
    assert said in refusal(lambda: main_pretrain.get_args(flags.split()))


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main_reconstruct.get_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "share of the patches that are removed (default: 0.75)" in printed and "(default: None)" not in printed


def test_a_run_that_goes_on_does_not_need_the_file_that_it_began_with(tmp_path):
    (tmp_path / "checkpoint-0.pth").write_text("")
    for resume in (str(tmp_path / "checkpoint-0.pth"), "auto"):
        words = ["--finetune", "gone.pth", "--resume", resume, "--output_dir", str(tmp_path), "--data_path", "x"]
        with pytest.raises(UserError) as caught:
            checks.check(JOBS["finetune"].get_args(words), MODELS["finetune"])
        assert "--data_path x" in str(caught.value) and "gone.pth" not in str(caught.value)


def test_another_runs_checkpoints_are_not_overwritten_unasked(tmp_path, monkeypatch):
    """A run that does not resume a folder's checkpoints is refused in it, and no file is changed."""
    (tmp_path / "run").mkdir()
    for name in ("run/checkpoint-3.pth", "elsewhere.pth"):
        (tmp_path / name).write_bytes(b"precious")
    common = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    for more in ([], ["--resume", str(tmp_path / "elsewhere.pth")]):
        with pytest.raises(UserError, match="holds another run .checkpoint-3.pth.: --resume auto"):
            checks.check(main_pretrain.get_args([*common, *more]), models_mae.MODELS)
    for more in (["--resume", "auto"], ["--overwrite"], ["--resume", str(tmp_path / "run" / "checkpoint-3.pth")]):
        checks.check(main_pretrain.get_args([*common, *more]), models_mae.MODELS)
    assert (tmp_path / "run" / "checkpoint-3.pth").read_bytes() == b"precious"
    words = [*common, "--finetune", str(tmp_path / "run" / "checkpoint-3.pth"), "--overwrite"]
    with pytest.raises(UserError, match="--overwrite would remove --finetune"):
        checks.check(main_finetune.get_args(words), models_vit.MODELS)
    # A restart by the launcher would remove what the run itself has saved.
    for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(UserError, match="--overwrite would remove this run's own checkpoints"):
            checks.check(main_pretrain.get_args([*common, "--overwrite"]), models_mae.MODELS)
        checks.check(main_pretrain.get_args([*common, "--overwrite", "--resume", "auto"]), models_mae.MODELS)
        monkeypatch.setenv(name, "0")
    # A log without checkpoints belongs to another run, too.
    (tmp_path / "run" / "checkpoint-3.pth").rename(tmp_path / "run" / "log.txt")
    with pytest.raises(UserError, match="holds another run .log.txt."):
        checks.check(main_pretrain.get_args(common), models_mae.MODELS)


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        ("finetune", "--crop_pct 87.5", "--crop_pct 87.5 must be at least 0.01, and at most 1"),
        ("pretrain", "--seed 4294967296", "--seed 4294967296 must be at least 0 and less than 2147483648"),
        ("pretrain", "--start_epoch 400", "--start_epoch 400 must be less than --epochs 400"),
        ("linprobe", "--blr 0.1 0.2 --min_lr 0.01", "--min_lr would differ between the heads of several --blr"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(job, flags, message):
    models = models_mae.MODELS if job == "pretrain" else models_vit.MODELS
    problems = checks.flag_problems(JOBS[job].get_args(flags.split()), models)
    assert any(problem.startswith(message) for problem in problems)


def test_all_problems_are_reported_at_once():
    args = main_pretrain.get_args(["--model", "no", "--batch_size", "0", "--mask_ratio", "2", "--epochs", "3"])
    with pytest.raises(UserError) as caught:
        checks.check(args, models_mae.MODELS)
    message = str(caught.value)
    flags = ("--model no", "--batch_size 0", "--mask_ratio 2", "--warmup_epochs 40", "--data_path")
    assert all(flag in message for flag in flags)


def test_a_mistake_ends_in_one_message_and_exit_code_2(script, images, tmp_path):
    done = script("main_pretrain.py", "--data_path", tmp_path / "none", "--device", "cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith("error: --data_path")
        and done.stderr.count("\n") == 1
        and "train/<class>/<images>" in done.stderr
    )


def test_without_a_compiler_nothing_is_compiled_unasked(monkeypatch, capsys):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not speed.compiles(cpu, None) and not speed.compiles(cuda, False)
    monkeypatch.setattr(speed, "compile_problem", lambda device: "Failed to find C compiler.")
    with pytest.raises(UserError, match="--compile: torch.compile does not work here: Failed to find C compiler"):
        speed.compiles(cpu, True)
    assert not speed.compiles(cuda, None)
    assert "notice: the blocks are not compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_compiler_is_noticed_by_trying_it(script, tmp_path):
    words = "import torch; from util import speed; print(speed.compile_problem(torch.device('cpu')))"
    done = script("-c", words, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "no-such-compiler" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_a_full_dev_shm_is_a_message_that_says_how_to_start_the_container(text, refusal):
    def main():
        raise RuntimeError(text)

    said = refusal(main)
    assert "--ipc=host" in said and said.count("\n") == 1


def test_a_full_gpu_is_a_message_that_says_what_to_lower(refusal):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    assert refusal(main) == (
        "error: rank 0: CUDA out of memory. Halve --batch_size and double --accum_iter, or add --grad_checkpoint\n"
    )


def test_every_flag_with_a_range_or_a_rule_on_resuming_is_some_jobs_flag():
    known = {name for job in JOBS.values() for name in vars(job.get_args([]))}
    ranged = {name for _, names in checks.FLAGS_BY_RANGE for name in names.split()}
    assert ranged <= known and misc.NEUTRAL_FLAGS | set(misc.SCHEDULE) <= known

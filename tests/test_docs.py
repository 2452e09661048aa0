"""Documents: every link and anchor leads somewhere, every flag exists, and commands marked as runnable run."""

import argparse
import importlib
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import main_export
import models_mae
from recipes.segmentation import garments

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

# Flags in the documents that belong to other programs: torchrun, srun and sbatch, docker and others.
OTHERS = {
    *("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--rdzv_conf"),
    *("--max-restarts", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue"),
    *("--open-mode", "--index-url"),
    *("--ipc", "--shm-size", "--logdir", "--help", "--sample", "--modules"),
}
SCRIPTS = [
    *("main_pretrain", "main_finetune", "main_linprobe", "main_predict", "main_features", "main_reconstruct"),
    *("main_export", "main_submitit", "demo", "recipes.segmentation.train", "benchmarks.gpu", "benchmarks.step"),
    *("benchmarks.loader", "benchmarks.masking", "benchmarks.peaks", "benchmarks.train", "benchmarks.tuning"),
    *("scripts.mean_std", "scripts.pack", "scripts.pixel_baseline", "scripts.prepare_data", "scripts.prepare_imagenet"),
    *("scripts.benchmark_tables", "recipes.ablations"),
]


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path):
    return {slug(line.lstrip("#")) for line in FENCE.sub("", path.read_text()).splitlines() if line.startswith("#")}


@names
def test_links_lead_somewhere(document):
    text = FENCE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"https?://|\.\./\.\./actions/", target):  # the latter is GitHub's, beside the repository
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists() and path.is_relative_to(ROOT), f"{document.name}: {target} leads nowhere"
        assert path.suffix not in (".png", ".svg") or path.stat().st_size > 1000, f"{document.name}: {target} is empty"
        assert not anchor or anchor in anchors(path), f"{document.name}: {target}: {sorted(anchors(path))}"


def test_anchors_are_github_s():
    assert slug(" `--to timm`, and [others](x.md) ") == "--to-timm-and-others"
    assert slug(" TensorBoard and Weights & Biases") == "tensorboard-and-weights--biases"


class _Parser(Exception):
    pass


def flags_of(module, monkeypatch):
    """Return the flags of a script, by stopping it where it parses its command line."""

    def stop(self, *_, **__):
        raise _Parser(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    script = importlib.import_module(module)
    with pytest.raises(_Parser) as stopped:
        script.get_args() if hasattr(script, "get_args") else script.main()
    return set(stopped.value.args[0]._option_string_actions)


def test_flags_in_the_documents_exist(monkeypatch):
    known = set(OTHERS)
    for module in SCRIPTS:
        known |= flags_of(module, monkeypatch)
    for document in DOCUMENTS:
        text = document.read_text()
        if document.name == "CHANGELOG.md":
            text = text[: text.index("\nRemoved")] + text[text.index("\nAdded") :]
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert named <= known, f"{document.name}: {sorted(named - known)}"


def commands(*marks):
    """Return the lines of the documents' blocks with these marks, in their order, with the documents' names."""
    found = []
    for document in DOCUMENTS:
        for mark, block in FENCE.findall(document.read_text()):
            if mark.strip() in marks:
                lines = block.replace("\\\n", " ").splitlines()
                found += [(document.name, line) for line in lines if line.strip()]
    return found


def test_every_command_has_flags_of_its_own_script(monkeypatch):
    """And a checkpoint's number is that of the last epoch of the run that wrote it."""
    checked, last = 0, {}
    for document, line in commands("", "sh", "sh run"):
        if not (called := re.search(r"(?:python|torchrun.*?) ((?:\w+/)*\w+)\.py\b(.*)", line.split("#")[0])):
            continue
        module, words = called[1].replace("/", "."), called[2].split(" -- ")[0]
        surplus = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", words)) - flags_of(module, monkeypatch)
        assert not surplus, f"{document}: {line}: {surplus}"
        checked += 1
        if (folder := re.search(r"--output_dir (\S+)", words)) and (epochs := re.search(r"--epochs (\d+)", words)):
            last[folder[1]] = int(epochs[1]) - 1
        for folder, number in re.findall(r"(\S+)/checkpoint-(\d+)\.pth", words):
            assert last.get(folder, int(number)) == int(number), f"{document}: {line}"
    assert checked > 30


SMALL = "--input_size 28 --num_workers 0 --batch_size 8 --accum_iter 1 --epochs 1 --warmup_epochs 0 --amp off"
ORDER = ("main_pretrain.py", "main_finetune.py", "main_linprobe.py")


@pytest.fixture
def workplace(images, tmp_path, monkeypatch):
    """A folder to run the documents' commands in, with the files that they take as given."""
    model = models_mae.mae_vit_demo_patch4(img_size=28, norm_pix_loss=True)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit_base_full.pth")
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder") and k != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_base.pth")
    monkeypatch.setattr(sys, "argv", ["garments.py", str(tmp_path / "MASKED")])
    monkeypatch.setattr(garments, "SAMPLES", images)
    garments.main()
    (tmp_path / "DIR").symlink_to(images)
    (tmp_path / "PHOTOS").symlink_to(images / "val")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_in_the_documents_runs(workplace):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for name, value in (("FOLDER", str(ROOT)), ("checkpoint-399.pth", "mae_pretrain_vit_base_full.pth")):
            block = block.replace(name, value)
        block = re.sub(r"vit_base_patch16", "vit_demo_patch4", block).replace("196", "49")
        values = {"imgs": torch.zeros(2, 3, 28, 28)}
        exec(block, values)
        assert values["model"].patch_embed.num_patches == 49
    assert values["tokens"].shape == (2, 50, 128) and values["pictures"].shape == (2, 3, 28, 28)


def shrink(command):
    """Return a command's script and its words, with a small model for one epoch in place of the model that it names."""
    command = re.sub(r"checkpoint-\d+", "checkpoint-0", command.split("#")[0])
    command = re.sub(r"(mae_)?vit_(base|large|small)_patch16", lambda name: f"{name[1] or ''}vit_demo_patch4", command)
    python, script, *words = shlex.split(re.sub(r"(?<=--nb_classes )N\b", "10", command))
    assert python == "python", command
    if script in ORDER:
        words += SMALL.split() + (["--input_size", "32"] if "--patch_size" in words else [])
    if script.endswith("segmentation/train.py"):
        words += ["--size", "32", "--epochs", "1"]
    if not script.startswith(("main_export", "main_submitit")):
        words += ["--device", "cpu"]
    return script, words


def test_commands_that_are_marked_as_runnable_run(workplace, monkeypatch, capsys):
    todo = [(document, *shrink(command)) for document, command in commands("sh run")]
    assert len(todo) > 10
    # Jobs first, pre-training before the others: documents build upon each other's output.
    todo.sort(key=lambda command: ORDER.index(command[1]) if command[1] in ORDER else len(ORDER))
    todo.sort(key=lambda command: "--eval" in command[2])
    done = set()
    for document, script, words in todo:
        if (script, *words) in done:
            continue
        done.add((script, *words))
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [script, *words])
        try:
            module.main()
        except BaseException as error:
            raise AssertionError(f"{document}: python {script} {' '.join(words)}") from error
    for file in ("predictions.csv", "features.npz", "features.png", "grid.png", "exported/hf/model.safetensors"):
        assert (workplace / file).is_file(), file
    assert all(f"| `{name}` |" in (ROOT / "docs" / "export.md").read_text() for name in main_export.EXPORTERS)

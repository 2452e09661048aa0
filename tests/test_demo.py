"""The demo: pre-training on the samples improves classification, partial fine-tuning and attentive probing.

Takes minutes (pytest -m slow).
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import demo
from util.errors import UserError


@pytest.mark.slow
def test_demo_shows_what_pretraining_is_worth(script, tmp_path, monkeypatch, capsys):
    """A third of the demo's epochs shows it, with smaller differences than those in the README."""
    monkeypatch.setattr(sys, "argv", ["demo.py", "--quick", "--output_dir", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    demo.main()
    said, bars = capsys.readouterr()
    assert re.search(r"pretrain +\d+% \|.* left, epoch \d+, loss \d", bars) and "scratch 100% |" in bars
    assert f"first reconstructions, after 4 epochs: {tmp_path}/pretrain/reconstructions/epoch-0003.png" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["probe"] - results["probe_untrained"] >= 18
    assert results["finetune"] - results["scratch"] >= 6
    assert 78 < results["pixel_neighbours"] < 79 and 0.3 < results["pretrain_loss"] < 1
    rows = ("pre-training loss", "probe, pre-trained", "probe, untrained", "fine-tuned", "from scratch", "raw pixels")
    assert all(row in said for row in rows)
    assert (tmp_path / "reconstruction.png").stat().st_size > 10_000

    # On the same encoder, training one block more helps (the paper's Figure 9), and a learned pooling works, too. The
    # three run at once: this is the longest test, and at its end the other cores are often idle.
    encoder = tmp_path / "pretrain/checkpoint-11.pth"
    words = [*demo.CLASSIFY.split(), "--finetune", encoder, "--model", "vit_demo_patch4"]
    tune = "--batch_size 32 --epochs 3 --warmup_epochs 1 --lr 2e-3 --drop_path 0 --smoothing 0 --aa none --reprob 0"
    probe = "--cls_token --batch_size 50 --epochs 4 --warmup_epochs 1 --lr 3e-3 --probe attentive"
    runs = {
        "none": ("main_finetune.py", f"{tune} --trainable_blocks 0"),
        "one": ("main_finetune.py", f"{tune} --trainable_blocks 1"),
        "attentive": ("main_linprobe.py", probe),
    }

    def train(name):
        main, more = runs[name]
        done = script(main, *words, *more.split(), "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "log.txt").read_text().splitlines()[-1])["test_acc1"]

    with ThreadPoolExecutor() as pool:
        accuracy = dict(zip(runs, pool.map(train, runs), strict=True))
    assert accuracy["one"] > accuracy["none"] + 2, accuracy
    assert accuracy["attentive"] > results["probe_untrained"] + 20, accuracy


def test_the_demo_replaces_no_run_but_its_own(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "checkpoint-399.pth").write_text("of a week's training")
    with pytest.raises(UserError, match="pretrain holds a run that is not the demo's"):
        demo.refuse_other_runs(tmp_path)
    (tmp_path / "pretrain" / "out.txt").write_text("output of the demo")
    demo.refuse_other_runs(tmp_path)

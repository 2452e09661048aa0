"""The demo's promise: what pre-training on the samples is worth (minutes; pytest -m slow)."""

import json

import pytest


@pytest.mark.slow
def test_demo_shows_what_pretraining_is_worth(script, tmp_path):
    done = script("demo.py", "--output_dir", tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["probe"] - results["probe_untrained"] >= 25
    assert results["finetune"] - results["scratch"] >= 7
    assert results["finetune"] > results["pixel_neighbours"]
    assert 78 < results["pixel_neighbours"] < 79 and 0.3 < results["pretrain_loss"] < 1
    rows = ("pre-training loss", "probe, pre-trained", "probe, untrained", "fine-tuned", "from scratch", "raw pixels")
    assert all(row in done.stdout for row in rows)

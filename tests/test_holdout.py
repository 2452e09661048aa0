"""Validation images that are held out of the training images."""

import hashlib
import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import ranks
import torch
from archives import pack
from conftest import ROOT, SAMPLES, link_images

import main_finetune
import main_linprobe
import main_pretrain
from util import inference
from util.data import datasets, loaders
from util.data.holdout import choose_held_out
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import CentreCrop
from util.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import mean_std
import pixel_baseline

CPU = torch.device("cpu")


def names(data, split, **more):
    """Return the names of the images of a split, relative to it."""
    images = datasets.open_split(datasets.EvalImages, data, split, None, PixelSpec(), **more)
    return [images.name(index) for index in range(len(images))]


def parts(path, fraction=0.25, seed=0, **more):
    """Return the names of the training images, and of those that are held out."""
    data = DataSpec(str(path), fraction, seed)
    return names(data, "train", **more), names(data, "val", **more)


@pytest.fixture
def folder(tmp_path):
    """Folder of training images alone, 60 of each of 4 classes."""
    link_images(SAMPLES / "train", tmp_path / "data" / "train", classes=4, count=60)
    return tmp_path / "data"


def test_the_parts_are_disjoint_and_complete_and_each_class_is_shared_alike(folder):
    train, val = parts(folder)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(str(path.relative_to(folder / "train")) for path in folder.glob("train/*/*"))
    for split, share in ((train, 0.75), (val, 0.25)):
        assert split == sorted(split)
        counts = Counter(name.split("/")[0] for name in split)
        assert len(counts) == 4 and all(abs(count / 60 - share) < 0.2 for count in counts.values()), counts


def test_the_seed_chooses(folder):
    assert parts(folder, seed=0) == parts(folder, seed=0)
    assert parts(folder, seed=0) != parts(folder, seed=1)
    fractions = [set(parts(folder, fraction)[1]) for fraction in (0.1, 0.2, 0.6)]
    assert fractions[0] < fractions[1] < fractions[2], "a larger share holds out the same images, and more"


def test_images_that_are_added_later_move_none(folder):
    before = parts(folder)
    link_images(SAMPLES / "train", folder / "more", classes=4, count=100)
    for file in folder.glob("more/*/*"):
        target = folder / "train" / file.parent.name / f"new-{file.name}"
        if not target.exists():
            file.rename(target)
    shutil.rmtree(folder / "more")
    after = parts(folder)
    assert len(after[0]) > len(before[0]) and len(after[1]) > len(before[1])
    for old, new in zip(before, after, strict=True):
        assert set(old) < set(new)


def score(name, seed=0):
    """Return an image's hash as a number from 0 to 1, by hand."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def test_the_choice_is_a_hash_that_no_later_version_may_change(folder):
    """Otherwise a run that goes on with a new version would train on what it held out before."""
    train, val = parts(folder, 0.25)
    assert all(score(name) >= 0.25 for name in train) and all(score(name) < 0.25 for name in val)
    assert [round(score(f"ankle_boot/{number:05d}.png"), 6) for number in (0, 11, 27)] == [0.577557, 0.44119, 0.6663]

    # In a class without any below the share it is the smallest, in one with all below it the largest.
    names = [b"a/1", b"a/2", b"a/3", b"a/4"]
    ranked = np.argsort([score(name.decode()) for name in names])
    assert np.flatnonzero(choose_held_out(names, np.zeros(4, int), 1e-9, 0)) == ranked[:1]
    assert np.flatnonzero(~choose_held_out(names, np.zeros(4, int), 1, 0)) == ranked[3:]


@pytest.mark.parametrize("seed", range(4))
def test_small_classes_are_in_both_parts(tmp_path, seed):
    """Of two images one is held out, of one none, whatever the share."""
    for number, source in enumerate(sorted((SAMPLES / "train").iterdir())[:6]):
        count = 1 + number // 2  # two classes each of one, two and three images
        (tmp_path / "train" / source.name).mkdir(parents=True)
        for file in sorted(source.iterdir())[:count]:
            (tmp_path / "train" / source.name / file.name).symlink_to(file)
    for fraction in (0.001, 0.5, 0.999):
        train, val = (Counter(name.split("/")[0] for name in part) for part in parts(tmp_path, fraction, seed))
        assert len(train) == 6 and len(val) == 4 and sum(train.values()) + sum(val.values()) == 12


@pytest.mark.parametrize("form", ["one", "shards", "classes", "webdataset"])
def test_folders_and_archives_are_divided_alike(folder, tmp_path, form):
    expected = parts(folder)
    packed_folder = pack(folder, tmp_path / "packed", form)
    assert parts(packed_folder) == expected
    specs = [DataSpec(str(place), 0.25) for place in (packed_folder, folder)]
    for split in ("train", "val"):
        packed, loose = (datasets.open_split(datasets.EvalImages, spec, split, None, PixelSpec()) for spec in specs)
        assert (packed.targets == loose.targets).all()
        for index in (0, len(loose) // 2, len(loose) - 1):
            assert (packed[index][0] == loose[index][0]).all()


def test_pretraining_holds_out_what_fine_tuning_does_and_images_without_classes_too(folder, tmp_path):
    assert parts(folder, classes_optional=True) == parts(folder)
    (tmp_path / "loose").mkdir()
    for number, file in enumerate(sorted(folder.glob("train/*/*"))[:40]):
        (tmp_path / "loose" / f"{number}.png").symlink_to(file.resolve())
    train, val = parts(tmp_path / "loose", classes_optional=True)
    assert 0 < len(val) < 20 and len(train) + len(val) == 40 and not set(train) & set(val)

    # Images beside folders: the scripts leave out what pre-training holds out, as of one class.
    (tmp_path / "mixed").mkdir()
    for number, file in enumerate(sorted(folder.glob("train/*/*"))):
        place = tmp_path / "mixed" / (f"{number // 4}" if number % 2 else "") / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(file.resolve())
    train, _ = parts(tmp_path / "mixed", classes_optional=True)
    found = inference.find_images([tmp_path / "mixed"], val_fraction=0.25)
    assert sorted(str(file.relative_to(tmp_path / "mixed")) for file in found) == sorted(train)


def held_out_on_ranks(path):
    data, loading = DataSpec(str(path), 0.25), loaders.Loading(4, 0, False, 0, CPU)
    train, val = loaders.classifier_loaders(data, 4, CentreCrop(28), CentreCrop(28), PixelSpec(), loading)
    trained = [train.dataset.images.name(index) for index in range(len(train.dataset))]
    return trained, [val.dataset.name(index) for index in range(len(val.dataset))]


def test_every_rank_has_the_same_parts(folder, tmp_path):
    expected = parts(folder)
    assert ranks.run(2, tmp_path / "out", held_out_on_ranks, folder) == [expected, expected]


SMALL = (
    "--input_size 28 --patch_size 7 --batch_size 16 --epochs 1 --warmup_epochs 0 --amp off --device cpu "
    "--val_fraction 0.25"
)
CLASSIFIER = f"{SMALL} --model vit_demo_patch4 --nb_classes 4"


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        (main_pretrain, f"{SMALL} --model mae_vit_demo_patch4 --monitor_freq 1"),
        (main_finetune, CLASSIFIER),
        (main_linprobe, CLASSIFIER),
    ],
)
def test_the_jobs_train_on_the_one_part_and_measure_on_the_other(job, flags, folder, tmp_path, capsys):
    train, val = parts(folder)
    capsys.readouterr()
    argv = [*flags.split(), "--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    job.main(argv)
    said = capsys.readouterr().out
    assert f"data      {len(train)} images in {folder}/train; {len(val)} more are held out for validation" in said
    per_class = Counter(path.split("/")[0] for path in val).values()
    each = f"{min(per_class)} to {max(per_class)} of each class"
    assert f"notice: {len(val)} of the 240 images in {folder}/train are held out as val: {each}" in said
    assert re.search(rf"trained 1 epoch in \d+ s, on {len(train)} images in .*; {len(val)} more are held out", said)
    line = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert "test_knn" in line or 0 <= line["test_acc1"] <= 100
    assert len(line) > 4 and line["test_loss"] > 0

    if job is not main_pretrain:
        job.main([*argv, "--eval", "--resume", str(tmp_path / "run" / "checkpoint-0.pth")])
        evaluated = capsys.readouterr().out
        assert f"* Acc@1 {line['test_acc1']:.3f}" in evaluated and "notice: {tmp_path}" not in evaluated
        job.main([*argv, "--eval", "--resume", str(tmp_path / "run" / "checkpoint-0.pth"), "--val_seed", "1"])
        assert "was made with --val_seed at its default, here it is 1" in capsys.readouterr().out


def test_a_val_that_is_there_is_not_read_and_one_that_is_not_is_offered(folder, capsys):
    shutil.copytree(folder / "train", folder / "val", symlinks=True)
    assert len(names(DataSpec(str(folder)), "val")) == 240
    expected = parts(folder)[1]
    assert len(expected) < 240
    assert f"{folder}/val is not read, since --val_fraction is given" in capsys.readouterr().out

    (folder / "val").rename(folder / "validation")
    with pytest.raises(
        UserError, match=r"there is validation: rename it, or link val to it\), or --val_fraction 0.1 ho"
    ):
        names(DataSpec(str(folder)), "val")
    assert parts(folder)[1] == expected


def test_classes_of_one_image_have_none_to_hold_out(tmp_path):
    link_images(SAMPLES / "train", tmp_path / "train", classes=3, count=1)
    assert len(names(DataSpec(str(tmp_path), 0.9), "train")) == 3
    with pytest.raises(UserError, match="no image of .*train can be held out for validation: none of its classes has"):
        names(DataSpec(str(tmp_path), 0.9), "val")


@pytest.mark.parametrize("flag", ["--val_fraction 1", "--val_fraction -0.1", "--val_seed -1"])
def test_wrong_values_are_refused(flag, folder, tmp_path, refusal):
    argv = [*SMALL.split(), *flag.split(), "--data_path", str(folder), "--output_dir", str(tmp_path)]
    said = refusal(lambda: main_pretrain.main([*argv, "--model", "mae_vit_demo_patch4"]))
    assert flag.split()[0] in said


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_the_scripts_divide_the_images_as_training_does(folder, tmp_path, capsys):
    train, val = parts(folder)
    for split, part in (("train", train), ("val", val)):
        for name in part:
            target = tmp_path / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((folder / "train" / name).resolve())

    def printed(main, *argv):
        capsys.readouterr()
        main([str(word) for word in argv])
        return capsys.readouterr().out.splitlines()[-1]

    flags = "--val_fraction", 0.25
    told = printed(mean_std.main, folder / "train", *flags)
    assert told == printed(mean_std.main, tmp_path / "train") != printed(mean_std.main, folder / "train")
    with pytest.raises(UserError, match="holds train, of which --val_fraction holds out images: name .*train"):
        mean_std.main([str(folder), *map(str, flags)])
    one = folder / "train" / train[0]  # the only image that is given is held out by no share
    assert printed(mean_std.main, one, *flags) == printed(mean_std.main, one)
    baseline = printed(pixel_baseline.main, "--data_path", folder, "--iterations", 5, *flags)
    assert baseline == printed(pixel_baseline.main, "--data_path", tmp_path, "--iterations", 5)
    for main, argv in ((mean_std.main, [folder / "train"]), (pixel_baseline.main, ["--data_path", folder])):
        with pytest.raises(UserError, match="--val_fraction 2.0 must be at least 0 and less than 1"):
            main([*map(str, argv), "--val_fraction", "2"])

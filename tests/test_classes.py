"""Names of classes, evaluation on a part of them, and figures and losses for classes of different sizes."""

import csv
import json
import re

import numpy as np
import pytest
import ranks
import torch
from conftest import SAMPLES, link_images
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import engine_finetune
import main_export
import main_finetune
import main_linprobe
import main_predict
import models_load
import models_vit
from util.amp import LossScaler
from util.data import datasets, loaders
from util.data.class_names import read_class_names
from util.data.images import PixelSpec
from util.data.splits import DataSpec
from util.data.transforms import CentreCrop, Crop
from util.errors import UserError
from util.report.scores import Evaluation, Scores

CPU = torch.device("cpu")
FLAGS = "--input_size 28 --patch_size 7 --batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0"
SMALL = f"{FLAGS} --amp off --device cpu --model vit_demo_patch4".split()
CLASSES = sorted(folder.name for folder in (SAMPLES / "val").iterdir())


# Files of names.


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nowl\n",
        "\ufeffcat\r\n dog \r\nowl",
        '["cat", "dog", "owl"]',
        '{"label_names": ["cat", "dog", "owl"], "architecture": "vit", "num_classes": 3}',
        '{"pretrained_cfg": {"label_names": ["cat", "dog", "owl"]}, "architecture": "vit"}',
        '{"id2label": {"1": "dog", "0": "cat", "2": "owl"}, "label2id": {"cat": 0}, "hidden_size": 4}',
        '{"0": "cat", "2": "owl", "1": "dog"}',
        '{"0": ["cat", "house cat"], "1": ["dog", "hound"], "2": ["owl", "screech owl"]}',
        '{"owl": 2, "cat": 0, "dog": 1}',
    ],
)
def test_names_are_read_in_the_order_of_the_numbers(text, tmp_path):
    (tmp_path / "names").write_text(text, encoding="utf-8", newline="")
    assert read_class_names(tmp_path / "names") == ["cat", "dog", "owl"]


def test_names_that_are_not_utf8_are_those_of_folders(tmp_path):
    (tmp_path / "names").write_bytes(b"caf\xe9\nbar\n")
    assert read_class_names(tmp_path / "names") == ["caf\udce9", "bar"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        ("a\n\nb", "holds an empty name"),
        ("a\nb\na", "names classes twice: a"),
        ('{"0": "a", "2": "b"}', "its 2 classes do not have the numbers from 0 to 1"),
        ('{"cat": 0, "kitten": 0, "dog": 1}', "two of its names have the same number"),
        ('{"a": "b"}', "can't be used: invalid literal"),
        ("[1, 2]", "it holds other things than names"),
        ('{"label_names": 5}', "it holds no list of names"),
        ('["a", {"b": 1}]', "it holds other things than names"),
        ('["a", "b"', "can't be used: "),
        ("[" * 100_000, "can't be used: "),
    ],
)
def test_what_is_no_file_of_names_is_refused(text, message, tmp_path):
    (tmp_path / "names").write_text(text)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / "names")
    with pytest.raises(UserError, match="missing: No such file"):
        read_class_names(tmp_path / "missing")


# Released classifiers, which name no classes.


@pytest.fixture
def released(tmp_path):
    """File of a classifier in the released form, and one of the names of its classes, whose order is not sorted."""
    torch.manual_seed(0)
    model = models_vit.vit_demo_patch4(img_size=28, patch_size=7, num_classes=10, global_pool=True)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned.pth")
    names = [*CLASSES[3:], *CLASSES[:3]]
    (tmp_path / "names.txt").write_text("\n".join(names))
    return tmp_path / "mae_finetuned.pth", tmp_path / "names.txt"


def predictions(table):
    with table.open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_a_released_classifier_predicts_with_names(released, tmp_path, refusal):
    file, names = released
    argv = ["--resume", str(file), "--images", str(SAMPLES / "val" / "bag"), "--output", str(tmp_path / "p.csv")]
    assert "holds no class names: pass --class_names FILE" in refusal(lambda: main_predict.main(argv))
    main_predict.main([*argv, "--class_names", str(names)])
    rows = predictions(tmp_path / "p.csv")
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, range(10))))
    main_predict.main([*argv, "--class_names", str(tmp_path / "numbers.txt")])
    listed = names.read_text().split("\n")
    for image, row in predictions(tmp_path / "p.csv").items():
        assert rows[image]["class"] == listed[int(row["class"])]
    (tmp_path / "numbers.txt").write_text("a\nb")
    said = refusal(lambda: main_predict.main([*argv, "--class_names", str(tmp_path / "numbers.txt")]))
    assert "names 2 classes, and" in said and "has 10: name each of them" in said


def evaluate(capsys, *argv, job=main_finetune):
    """Evaluate with main_finetune.py; return what it printed and the figures of the closing line."""
    job.main([*SMALL, "--eval", *map(str, argv)])
    said = capsys.readouterr().out
    words = said.splitlines()[-1].split()
    return said, (float(words[2]), float(words[4]), float(words[6]))


def expected_figures(file, root, numbers):
    """Compute top-1, top-5 and loss of a file's logits, restricted by hand to the classes of these numbers."""
    checkpoint = torch.load(file, weights_only=True)
    model = models_load.classifier(checkpoint, str(file)).eval()
    images = datasets.open_split(datasets.EvalImages, DataSpec(str(root)), "val", CentreCrop(28), PixelSpec())
    loader = loaders.eval_loader(images, loaders.Loading(50, 0, False, 0, CPU), distributed=False)
    with torch.inference_mode():
        logits, targets = zip(*((model(imgs)[:, numbers], targets) for imgs, targets in loader), strict=True)
    logits, targets = torch.cat(logits), torch.cat(targets)
    top = logits.topk(min(5, len(numbers)), dim=1).indices == targets[:, None]
    loss = nn.functional.cross_entropy(logits, targets)
    return [100 * float(top[:, 0].float().mean()), 100 * float(top.any(dim=1).float().mean()), float(loss)]


def test_evaluation_finds_the_named_classes_whatever_their_order(released, images, capsys):
    file, names = released
    said, figures = evaluate(
        capsys, "--nb_classes", 10, "--resume", file, "--data_path", images, "--class_names", names
    )
    listed = names.read_text().split("\n")
    assert figures == pytest.approx(expected_figures(file, images, [listed.index(name) for name in CLASSES]), abs=1e-3)
    assert "notice" not in said

    # Without names class k is taken for the k-th folder, which is said once.
    said, plain = evaluate(capsys, "--nb_classes", 10, "--resume", file, "--data_path", images)
    assert plain == pytest.approx(expected_figures(file, images, list(range(10))), abs=1e-3)
    assert plain != figures and said.count("class k is taken to be the k-th folder") == 1


def test_a_part_of_the_classes_is_judged_by_its_own_logits(released, tmp_path, capsys, refusal):
    file, names = released
    link_images(SAMPLES / "val", tmp_path / "part" / "val", classes=6, count=20)
    argv = ["--nb_classes", 10, "--resume", file, "--data_path", tmp_path / "part"]
    said, figures = evaluate(capsys, *argv, "--class_names", names)
    listed = names.read_text().split("\n")
    numbers = [listed.index(name) for name in CLASSES[:6]]
    assert figures == pytest.approx(expected_figures(file, tmp_path / "part", numbers), abs=1e-3)
    assert "notice: 6 of the 10 classes are evaluated, and only their logits count" in said

    # What the messages advise works: names where there are none, the checkpoint's number of classes.
    told = refusal(lambda: main_finetune.main([*SMALL, "--eval", *map(str, argv)]))
    assert "--data_path has 6 class folders" in told and "name them with --class_names FILE" in told
    argv[1] = 6
    told = refusal(lambda: main_finetune.main([*SMALL, "--eval", *map(str, argv), "--class_names", str(names)]))
    assert "classes: 10 in the file, 6 here (--nb_classes)" in told

    (tmp_path / "part" / "val" / "unicorn").mkdir()
    argv[1] = 10
    told = refusal(lambda: main_finetune.main([*SMALL, "--eval", *map(str, argv), "--class_names", str(names)]))
    assert "only in --data_path: unicorn" in told and "class folders are among its classes" in told


def figures_on_rank(words, out):
    """Evaluate on the ranks' shares of the images; return top-1, top-5, loss, balanced accuracy and macro F1."""
    args = main_linprobe.get_args(words)
    _, loader = main_linprobe.open_data(args, CPU)
    model = main_linprobe.build_model(args, args.blr, pretrained=False)
    from util.checkpoint import weights

    numbers = weights.load_for_eval(args.resume, model, vars(args), loader.dataset.classes)
    models_vit.select_classes(model, numbers)
    names = [f"blr{blr:g}" for blr in args.blr]
    return engine_finetune.evaluate(model, loader, CPU, LossScaler("off", CPU), Evaluation(args.dist_eval, names))


def test_a_part_of_the_classes_gives_the_same_on_two_ranks_for_every_head_of_a_sweep(images, tmp_path):
    train = [*SMALL, "--nb_classes", "10", "--blr", "0.5", "5"]
    main_linprobe.main([*train, "--data_path", str(images), "--output_dir", str(tmp_path / "run")])
    checkpoint = tmp_path / "run" / "checkpoint-0.pth"
    link_images(SAMPLES / "val", tmp_path / "part" / "val", classes=3, count=7)
    words = [*train, "--dist_eval", "--eval", "--resume", str(checkpoint), "--data_path", str(tmp_path / "part")]
    alone = figures_on_rank(words, tmp_path)
    assert alone["acc5"] == 100 and alone["loss_blr5"] != alone["loss_blr0.5"]

    # By hand, from the logits of all ten classes.
    content = torch.load(checkpoint, weights_only=True)
    model = models_load.classifier_from_config(
        {key: value for key, value in content["model_config"].items() if key != "model"}
    )
    model.load_state_dict(content["model"])
    part = datasets.open_split(
        datasets.EvalImages, DataSpec(str(tmp_path / "part")), "val", CentreCrop(28), PixelSpec()
    )
    loader = loaders.eval_loader(part, loaders.Loading(21, 0, False, 0, CPU), distributed=False)
    imgs, targets = next(iter(loader))
    with torch.inference_mode():
        answers = model.eval()(imgs)[:, :, :3].argmax(dim=2)
    for number, name in enumerate(("blr0.5", "blr5")):
        assert alone[f"acc1_{name}"] == pytest.approx(100 * (answers[:, number] == targets).float().mean())
    for shared in ranks.run(2, tmp_path / "out", figures_on_rank, words, tmp_path):
        assert shared == pytest.approx(alone, rel=1e-6)


def test_training_numbers_the_classes_as_the_file_does_and_stores_it(images, tmp_path, capsys):
    names = [*CLASSES[5:], *CLASSES[:5]]
    (tmp_path / "names.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    train = [*SMALL, "--nb_classes", "10", "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    main_finetune.main([*train, "--class_names", str(tmp_path / "names.json")])
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-0.pth", weights_only=True)
    assert checkpoint["class_to_idx"] == {name: number for number, name in enumerate(names)}
    logged = json.loads((tmp_path / "run" / "log.txt").read_text())
    capsys.readouterr()

    # The file stores the names: evaluation, prediction and exports need the flag no more.
    argv = ["--nb_classes", 10, "--resume", tmp_path / "run" / "checkpoint-0.pth", "--data_path", images]
    _, figures = evaluate(capsys, *argv)
    keys = "test_acc1", "test_acc5", "test_loss"
    assert figures == pytest.approx([logged[key] for key in keys], abs=1e-3)


def test_class_folders_that_the_file_does_not_name_are_refused(images, tmp_path, refusal):
    (tmp_path / "names").write_text("\n".join(CLASSES[1:]))
    argv = [*SMALL, "--nb_classes", "9", "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    said = refusal(lambda: main_finetune.main([*argv, "--class_names", str(tmp_path / "names")]))
    assert f"not these folders in {images / 'train'}: {CLASSES[0]}" in said
    (tmp_path / "names").write_text("\n".join([*CLASSES, "unicorn"]))
    said = refusal(lambda: main_finetune.main([*argv, "--class_names", str(tmp_path / "names")]))
    assert "no images in" in said and "unicorn" in said and "take the class out of --class_names" in said


def test_an_export_takes_the_names(released, tmp_path, refusal):
    file, names = released
    argv = ["--resume", str(file), "--to", "timm", "--output", str(tmp_path / "timm")]
    main_export.main([*argv, "--class_names", str(names)])
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["label_names"] == names.read_text().split("\n")
    assert read_class_names(tmp_path / "timm" / "config.json") == config["label_names"]


def test_names_in_another_order_than_the_checkpoints_are_refused(images, tmp_path, refusal):
    train = [*SMALL, "--nb_classes", "10", "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    main_finetune.main(train)
    (tmp_path / "names").write_text("\n".join(reversed(CLASSES)))
    evaluation = [*train, "--eval", "--resume", str(tmp_path / "run" / "checkpoint-0.pth")]
    said = refusal(lambda: main_finetune.main([*evaluation, "--class_names", str(tmp_path / "names")]))
    assert "--class_names gives " in said and " other numbers than" in said
    # One that moves, beside new names, would swap two classes.
    (tmp_path / "names").write_text("\n".join([CLASSES[1], CLASSES[0], "new", *CLASSES[3:]]))
    said = refusal(lambda: main_finetune.main([*evaluation, "--class_names", str(tmp_path / "names")]))
    assert f"--class_names gives {CLASSES[1]}, {CLASSES[0]} other numbers than" in said


# Classes of different sizes.


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_scikit_learns(seed):
    """Classes of 10, 100 and 1,000 images, one without any that is answered, and one that is neither."""
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(seed)
    targets = torch.cat([torch.full((count,), number) for number, count in enumerate((10, 100, 1000))])
    logits = torch.randn(len(targets), 1, 5) + 2 * nn.functional.one_hot(targets, 5)[:, None]
    logits[:, :, 4] = -100
    scores = Scores(1, 5, CPU, confusion=False)
    for part in torch.randperm(len(targets)).split(64):
        scores.update(logits[part], targets[part])
    (figures,) = scores.figures()
    answers = logits[:, 0].argmax(dim=1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert figures["balanced_acc"] == pytest.approx(100 * metrics.balanced_accuracy_score(targets, answers))
    assert figures["macro_f1"] == pytest.approx(100 * metrics.f1_score(targets, answers, average="macro"))
    assert figures["acc1"] == pytest.approx(100 * metrics.accuracy_score(targets, answers))
    assert figures["acc5"] == 100
    assert figures["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits[:, 0], targets)), rel=1e-6)
    assert len({round(figures[key], 6) for key in ("balanced_acc", "macro_f1", "acc1")}) == 3


def unequal(root, **counts):
    """Make a folder of so many training images of each class, and for validation a fifth as many, but at least 2."""
    for name, count in counts.items():
        for split, number in (("train", count), ("val", max(2, count // 5))):
            (root / split / name).mkdir(parents=True)
            for file in sorted((SAMPLES / split / name).iterdir())[:number]:
                (root / split / name / file.name).symlink_to(file)
    return root


def test_balanced_weights_are_scikit_learns(tmp_path):
    utils = pytest.importorskip("sklearn.utils.class_weight")
    data = DataSpec(str(unequal(tmp_path, bag=40, coat=8, dress=2)))
    loading = loaders.Loading(10, 0, False, 0, CPU)
    loader = loaders.train_loader(data, Crop(28, (1.0, 1.0)), PixelSpec(), loading)
    targets = loader.dataset.images.targets
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=targets)
    assert loader.class_weights("balanced").tolist() == pytest.approx(expected.tolist())
    part = loaders.train_loader(data, Crop(28, (1.0, 1.0)), PixelSpec(), loading, fraction=0.5)
    assert part.class_weights("balanced").tolist() == pytest.approx([25 / 60, 25 / 12, 25 / 3])


def build_loss(class_weights, *flags):
    argv = ["--nb_classes", "3", "--data_path", "x", *map(str, flags)]
    return main_finetune.build_mixup_and_loss(main_finetune.get_args(argv), class_weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_weigh_images_by_their_classes(smoothing):
    """The loss of hard, smoothed and mixed labels is that of each image, times the weight of its class or classes."""
    torch.manual_seed(0)
    logits, targets, class_weights = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 4.0])
    log_p, one_hot = logits.log_softmax(dim=1), torch.eye(3)[targets]

    mixup, loss = build_loss(class_weights, "--smoothing", smoothing)
    own = -((1 - smoothing) * one_hot + smoothing / 3).mul(log_p).sum(dim=1)
    assert mixup is None and loss(logits, targets) == pytest.approx(float((class_weights[targets] * own).mean()))

    mixup, loss = build_loss(class_weights, "--smoothing", smoothing, "--mixup", 0.8)
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    own = -((1 - smoothing) * mixed + smoothing / 3).mul(log_p).sum(dim=1)
    assert mixup is not None and loss(logits, mixed) == pytest.approx(float(((mixed @ class_weights) * own).mean()))


def test_weights_weigh_each_head():
    torch.manual_seed(0)
    logits, targets, class_weights = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 4.0])
    expected = float(-(class_weights[targets] * logits.log_softmax(dim=1)[range(6), targets]).mean())
    assert engine_finetune.head_losses(logits, targets, class_weights) == pytest.approx(expected)
    several = torch.stack([logits, logits], dim=1)
    assert engine_finetune.head_losses(several, targets, class_weights) == pytest.approx(2 * expected)


@pytest.mark.parametrize("mixup", [0, 0.8])
def test_an_image_of_a_frequent_class_is_best_answered_by_its_own_class(mixup):
    """Whatever the weight of a rare class: else its share of the smoothed label would outweigh the image's class."""
    mix, loss = build_loss(torch.tensor([0.5, 50.0, 1.0]), "--mixup", mixup)  # with the default label smoothing
    targets = torch.zeros(2, dtype=torch.long)
    labels = mix(torch.rand(2, 3, 8, 8), targets)[1] if mix else targets
    logits = torch.zeros(2, 3, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert logits.softmax(dim=1)[:, 0].min() > 0.9


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_weights_the_losses_are_timms(smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    _, loss = build_loss(None, "--smoothing", smoothing)
    timms = LabelSmoothingCrossEntropy(smoothing)
    assert loss(logits, targets) == pytest.approx(float(timms(logits, targets)), rel=1e-6)

    # timm's Mixup smooths the labels itself.
    mixup, loss = build_loss(None, "--smoothing", smoothing, "--mixup", 0.8)
    labels = mixup_target(targets, 3, 0.7, 0.0)
    smoothed = mixup_target(targets, 3, 0.7, smoothing)
    expected = float(SoftTargetCrossEntropy()(logits, smoothed))
    assert mixup.label_smoothing == 0 and loss(logits, labels) == pytest.approx(expected, rel=1e-6)


def test_weighted_gradients_do_not_depend_on_the_size_of_batches():
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 3), torch.tensor([0] * 6 + [1, 2])
    class_weights = 8 / (3 * torch.tensor([6.0, 1.0, 1.0]))
    for smoothing in (0.0, 0.1):
        gradients = []
        for size in (8, 4, 1):
            bias = torch.zeros(3, requires_grad=True)
            for own, labels in zip(logits.split(size), targets.split(size), strict=True):
                loss = engine_finetune.weighted_cross_entropy(own + bias, labels, class_weights, smoothing)
                (loss * size / 8).backward()
            gradients.append(bias.grad)
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("job", [main_finetune, main_linprobe])
def test_the_best_checkpoint_is_that_of_the_figure_that_counts(job, tmp_path, capsys):
    data = unequal(tmp_path / "data", bag=40, coat=8, dress=2)
    argv = [*SMALL, "--nb_classes", "3", "--data_path", str(data), "--output_dir", str(tmp_path / "run")]
    argv += ["--epochs", "3", "--keep", "1", "--best_by", "balanced_acc", "--class_weights", "balanced"]
    job.main(argv)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    figures = [line["test_balanced_acc"] for line in lines]
    said, best = capsys.readouterr().out, figures.index(max(figures))
    assert "best balanced accuracy so far" in said
    assert "without --finetune the encoder starts from random weights" in said
    file = tmp_path / "run" / f"checkpoint-{best}.pth"
    assert f"best balanced accuracy: {max(figures):.2f} %, after epoch {best}, in {file}\n" in said and file.is_file()
    position = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)["position"]
    assert position["best"] == max(figures) and position["best_epoch"] == figures.index(max(figures))

    # The best by another figure is looked for anew.
    job.main([*argv, "--best_by", "acc1", "--resume", "auto", "--epochs", "4", "--resume_override"])
    position = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)["position"]
    last = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert position["best_epoch"] == 3 and position["best"] == last["test_acc1"]


def test_of_several_heads_the_best_is_that_of_the_figure_that_counts():
    """One head is right about the many of a class, the other about the few of two."""
    targets = torch.tensor([0] * 8 + [1, 2])
    many = torch.zeros(10, 3).index_fill_(1, torch.tensor(0), 1.0)
    few = nn.functional.one_hot((targets > 0) * targets, 3).float()
    few[:4] = torch.tensor([0.0, 1.0, 0.0])

    class Loader(list):
        dataset = None

    heads = torch.stack([many, few], dim=1)
    for best_by, best in (("acc1", "many"), ("balanced_acc", "few")):
        settings = Evaluation(head_names=["many", "few"], best_by=best_by)
        stats = engine_finetune.evaluate(
            nn.Identity(), Loader([(heads, targets)]), CPU, LossScaler("off", CPU), settings
        )
        assert stats["acc1"] == stats[f"acc1_{best}"] and stats["balanced_acc"] == stats[f"balanced_acc_{best}"]
        assert (stats["acc1_many"], stats["acc1_few"]) == (80, 60)


@pytest.mark.parametrize(
    ("answers", "targets", "said"),
    [([1, 1, 1], [0, 1, 2], True), ([1, 1, 0], [0, 1, 2], False), ([1, 1, 1], [1, 1, 1], False)],
)
def test_a_model_that_knows_one_answer_only_is_noticed(answers, targets, said, capsys):
    logits = nn.functional.one_hot(torch.tensor(answers), 3).float()
    engine_finetune.evaluate(nn.Identity(), [(logits, torch.tensor(targets))], CPU, LossScaler("off", CPU))
    assert ("every image was given the same class" in capsys.readouterr().out) == said


def test_a_best_checkpoint_that_lies_in_another_folder_is_not_named_in_this_one(images, tmp_path, capsys):
    argv = [*SMALL, "--nb_classes", "10", "--data_path", str(images)]
    main_finetune.main([*argv, "--output_dir", str(tmp_path / "first")])
    assert f"after epoch 0, in {tmp_path / 'first' / 'checkpoint-0.pth'}\n" in capsys.readouterr().out
    resume = ["--resume", str(tmp_path / "first" / "checkpoint-0.pth")]
    main_finetune.main([*argv, *resume, "--output_dir", str(tmp_path / "second")])
    assert re.search(r"best accuracy: \S+ %, after epoch 0\n", capsys.readouterr().out)

"""Data: messages for bad folders and bad files, replacement of bad files in training, conversion of images to RGB."""

import io
import re
import shutil
import struct
import unicodedata
import zlib

import faults
import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from util.data import loaders
from util.data.images import BadImage, PixelSpec, load_array
from util.data.splits import DataSpec
from util.errors import LocalError, UserError

CPU = torch.device("cpu")
MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "linprobe": main_linprobe.main}
SMALL = (
    "--input_size 28 --patch_size 7 --batch_size 16 --epochs 1 --warmup_epochs 0 --amp off --device cpu --num_workers 0"
)
MODEL = {"pretrain": "mae_vit_demo_patch4", "finetune": "vit_demo_patch4", "linprobe": "vit_demo_patch4"}


def job_argv(job, data, out, *more):
    head = [] if job == "pretrain" else ["--nb_classes", "10"]
    words = [*SMALL.split(), *head, "--model", MODEL[job], "--data_path", data, "--output_dir", out, *more]
    return [str(word) for word in words]


@pytest.fixture
def data(images, tmp_path):
    """Copy the images, so that a test may spoil them."""
    return shutil.copytree(images, tmp_path / "data")


def first_class(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())[0]


def rename_class(data):
    first_class(data / "val").rename(data / "val" / "zebra")


def encode_accents_in_two_ways(data):
    """As macOS does in names of an archive that another system's folder is compared with."""
    for split, form in (("train", "NFC"), ("val", "NFD")):
        first_class(data / split).rename(data / split / unicodedata.normalize(form, "caf\u00e9"))


BAD_FOLDERS = [
    ("pretrain", lambda data: shutil.rmtree(data / "train"), "no folder .*train: --data_path must hold train/<class>/"),
    ("finetune", lambda data: shutil.rmtree(data / "val"), "no folder .*val: --data_path must hold val/<class>/"),
    ("pretrain", lambda data: [shutil.rmtree(p) for p in (data / "train").iterdir()], "train has no class folders"),
    (
        "pretrain",
        lambda data: (data / "train" / "empty").mkdir(),
        "no images in .*train/empty: add some, or remove the folder from every split. (?!The files)",
    ),
    (
        "linprobe",
        lambda data: (data / "val" / "empty").mkdir(),
        "classes of train and val differ. only in .*val: empty",
    ),
    ("finetune", rename_class, r"classes of train and val differ. only in .*train: \w+.*; only in .*val: zebra"),
    ("finetune", encode_accents_in_two_ways, "only in .*train: caf.*; they look alike, but their accents"),
    (
        "linprobe",
        lambda data: shutil.rmtree(first_class(data / "val")),
        "classes of train and val differ. only in .*train",
    ),
]


def classes_in_data_path(data):
    shutil.rmtree(data / "val")
    for folder in (data / "train").iterdir():
        folder.rename(data / folder.name)
    (data / "train").rmdir()


BAD_FOLDERS.append(
    ("pretrain", classes_in_data_path, r"it holds \w+, .*: if these are the classes, move them into .*data/train\)")
)


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_a_split_in_place_of_its_folder_is_said(job, data, tmp_path):
    with pytest.raises(UserError, match=f"--data_path {data}/train is a split itself: pass --data_path {data}$"):
        MAINS[job](job_argv(job, data / "train", tmp_path / "out"))


@pytest.mark.parametrize(("job", "spoil", "message"), BAD_FOLDERS)
def test_bad_folders(job, spoil, message, data, tmp_path):
    spoil(data)
    with pytest.raises(UserError, match=message):
        MAINS[job](job_argv(job, data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("job", "more", "message"),
    [
        ("finetune", ["--nb_classes", "9"], "has 10 classes and --nb_classes is 9: pass --nb_classes 10"),
        ("linprobe", ["--nb_classes", "1000"], "--nb_classes is 1000: pass --nb_classes 10"),
        ("pretrain", ["--batch_size", "81"], "80 training images don't fill one batch of 81"),
    ],
)
def test_flags_that_do_not_fit_the_folders(job, more, message, images, tmp_path):
    with pytest.raises(UserError, match=message):
        MAINS[job](job_argv(job, images, tmp_path, *more))


def test_many_images_that_do_not_fill_a_batch_are_noticed(images, tmp_path, capsys):
    for batch_size, left_out in (("50", "leaves out 30 of the 80 images"), ("39", "")):
        argv = job_argv("linprobe", images, tmp_path, "--batch_size", batch_size, "--epochs", "1", "--overwrite")
        MAINS["linprobe"](argv)
        said = capsys.readouterr().out
        assert left_out in said and ("leaves out" in said) == bool(left_out)
    assert " updates per epoch, learning rate " in said and " parameters, 1,290 of them trained" in said


def test_more_accumulation_than_an_epoch_has_batches_is_noticed(images, tmp_path, capsys):
    for accum_iter, noticed in ((64, True), (5, False)):
        argv = job_argv("linprobe", images, tmp_path, "--accum_iter", accum_iter, "--overwrite", "--eval_freq", "9")
        MAINS["linprobe"](argv)
        said = capsys.readouterr().out
        notice = (
            "an epoch has 5 batches, fewer than --accum_iter 64: its one update is of 80 images, at a rate that is "
        )
        assert ("fewer than --accum_iter" in said) == noticed
        assert (f"{notice}meant for 1024; pass --accum_iter 5" in said) == noticed


def test_classes_that_differ_from_the_checkpoints(data, tmp_path):
    """Resuming and evaluation are refused, since the head would name the wrong classes."""
    MAINS["finetune"](job_argv("finetune", data, tmp_path / "out"))
    for split in ("train", "val"):
        first_class(data / split).rename(data / split / "zebra")
    checkpoint = str(tmp_path / "out" / "checkpoint-0.pth")
    for more in (["--resume", checkpoint], ["--resume", checkpoint, "--eval"]):
        with pytest.raises(UserError, match="trained on other classes.*only in --data_path: zebra"):
            MAINS["finetune"](job_argv("finetune", data, tmp_path / "out", *more))


def spoil_files(folder):
    """Replace images by an empty file, a truncated one, an HTML page and a decompression bomb; return their paths."""
    files = sorted(folder.glob("*/*"))[::11]
    whole = files[1].read_bytes()
    contents = (b"", whole[: len(whole) // 2], b"<html>404</html>", decompression_bomb())
    for file, content in zip(files, contents, strict=False):
        file.unlink()
        file.write_bytes(content)
    return files[: len(contents)]


def decompression_bomb():
    """Return a PNG file whose header claims 60,000 x 60,000 pixels."""
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "PNG")
    header = struct.pack(">II5B", 60000, 60000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return out.getvalue()[:8] + chunk + out.getvalue()[33:]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_bad_files_are_replaced_named_once_and_counted(workers, data, tmp_path):
    bad = spoil_files(data / "train")
    more = ["--max_bad_images", "0.05", "--epochs", "3", "--num_workers", workers]
    process = faults.start("pretrain", job_argv("pretrain", data, tmp_path / "out", *more), tmp_path / "said")
    assert faults.exit_code(process) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert [said.count(f"replaced by another one: {file}") for file in bad] == [1] * 4, said
    assert "4 of 80 images cannot be read" in said and "Traceback" not in said


def test_too_many_bad_files_stop_the_run(data, tmp_path):
    spoil_files(data / "train")
    process = faults.start(
        "pretrain", job_argv("pretrain", data, tmp_path / "out", "--num_workers", 2), tmp_path / "said"
    )
    assert faults.exit_code(process) == 2
    said = (tmp_path / "said").read_text()
    assert re.search(r"images in .*train cannot be read .named above., more than --max_bad_images 0.01", said), said


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_the_first_bad_file(workers, data, tmp_path):
    bad = spoil_files(data / "val")[0]
    words = job_argv("linprobe", data, tmp_path / "out", "--num_workers", workers)
    process = faults.start("linprobe", words, tmp_path / "said")
    assert faults.exit_code(process) == 2
    said = (tmp_path / "said").read_text()
    assert f"error: {bad}: not an image, or empty; evaluation counts every image" in said and "Traceback" not in said
    assert (tmp_path / "out" / "checkpoint-last.pth").is_file()  # what was trained is not lost


def test_a_val_folder_of_junk_ends_pretraining_in_a_message_and_saved(data, tmp_path):
    for file in (data / "val").glob("*/*"):
        file.unlink()
        file.write_bytes(b"junk")
    words = job_argv("pretrain", data, tmp_path / "out", "--num_workers", 1, "--monitor_freq", 1)
    process = faults.start("pretrain", words, tmp_path / "said")
    assert faults.exit_code(process) == 2
    said = (tmp_path / "said").read_text()
    assert "100 images in a row" in said and "--monitor_freq 0" in said and "Traceback" not in said
    assert (tmp_path / "out" / "checkpoint-last.pth").is_file()


def test_replacements_are_the_same_for_any_number_of_workers(data):
    """The image that takes the place of a bad one follows from seed, epoch and index."""
    spoil_files(data / "train")

    def batches(workers):
        loader = loaders.train_loader(
            DataSpec(str(data)), to_tensor, PixelSpec(), loaders.Loading(16, workers, False, 0, CPU)
        )
        loader.sampler.set_epoch(3)
        return torch.cat([imgs for imgs, _ in loader])

    assert torch.equal(batches(0), batches(2))


def to_tensor(img):
    return torch.from_numpy(img).permute(2, 0, 1) + torch.randint(10, ())


def test_loading_leaves_the_training_loops_random_streams_alone(images):
    loader = loaders.train_loader(DataSpec(str(images)), to_tensor, PixelSpec(), loaders.Loading(16, 0, False, 0, CPU))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader)
    assert torch.equal(torch.rand(3), expected)


def test_hidden_files_are_no_images(data):
    folder = first_class(data / "train")
    (folder / "._a.png").write_bytes(b"Mac")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "b.png").write_bytes(b"thumbnail")
    (data / "train" / ".ipynb_checkpoints").mkdir()
    loader = loaders.train_loader(DataSpec(str(data)), to_tensor, PixelSpec(), loaders.Loading(16, 0, False, 0, CPU))
    assert len(loader.dataset) == 80 and len(loader.dataset.images.classes) == 10


def save_and_load(img, path, **more):
    img.save(path, **more)
    return load_array(str(path))


RAMP = np.linspace(0, 65535, 64).reshape(8, 8)
EIGHT_BITS = np.rint(np.linspace(0, 255, 64)).reshape(8, 8)


@pytest.mark.parametrize(
    ("img", "name", "expected"),
    [
        (Image.fromarray(RAMP.astype(np.uint16)), "16.png", EIGHT_BITS),
        (Image.fromarray(RAMP.astype(np.uint16)), "16.tif", EIGHT_BITS),
        (Image.fromarray(RAMP.astype(np.int32)), "i.tif", EIGHT_BITS),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), "f.tif", EIGHT_BITS),
        (Image.fromarray((RAMP * 3 - 70000).astype(np.float32)), "range.tif", EIGHT_BITS),
        (Image.fromarray((RAMP / 6000).astype(np.float32)), "from 0.tif", EIGHT_BITS),
        (Image.fromarray((RAMP / 65535 - 1).astype(np.float32)), "up to 0.tif", EIGHT_BITS),
        (Image.fromarray(EIGHT_BITS.astype(np.uint8)), "grey.png", EIGHT_BITS),
        (Image.fromarray(EIGHT_BITS.astype(np.uint8)).convert("P"), "palette.png", EIGHT_BITS),
        (Image.fromarray((EIGHT_BITS > 100).astype(np.uint8) * 255).convert("1"), "1.png", (EIGHT_BITS > 100) * 255),
    ],
)
def test_every_depth_is_scaled_to_8_bits_and_not_clipped(img, name, expected, tmp_path):
    rgb = save_and_load(img, tmp_path / name)
    assert rgb.shape == (8, 8, 3) and np.abs(rgb - expected[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_over_white(mode, tmp_path):
    if mode == "P":
        img = Image.new("P", (4, 4), 7)
        img.putpalette([0, 0, 0] * 256)
        rgb = save_and_load(img, tmp_path / "a.png", transparency=7)
    else:
        rgb = save_and_load(Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (0,)), tmp_path / "a.png")
    assert (rgb == 255).all()
    half = save_and_load(Image.new("RGBA", (4, 4), (200, 0, 0, 128)), tmp_path / "half.png")
    assert np.abs(half[0, 0].astype(int) - [227, 127, 127]).max() <= 1


def test_cmyk_and_animations(tmp_path):
    cmyk = save_and_load(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), tmp_path / "c.jpg", quality=95)
    assert np.abs(cmyk[8, 8].astype(int) - [200, 30, 60]).max() < 12
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_array(str(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]
    assert load_array(str(tmp_path / "a.gif"), PixelSpec(4))[0, 0].tolist() == [255, 0, 0, 255]


def test_files_of_one_kind_have_one_scale(tmp_path):
    """Whether integers have 16 bits follows from the file format, not from the values in a file."""
    for low, high in ((0, 60000), (0, 99956)):
        Image.fromarray(np.array([[low, high]], np.int32)).save(tmp_path / "i.tif")
        assert load_array(str(tmp_path / "i.tif"), PixelSpec(1)).ravel().tolist() == [low, high]
    Image.fromarray(np.array([[0, 13107]], np.uint16)).save(tmp_path / "16.png")
    assert load_array(str(tmp_path / "16.png"), PixelSpec(1)).ravel() == pytest.approx([0, 0.2])
    rgba = load_array(str(tmp_path / "16.png"), PixelSpec(4))
    assert rgba[0].tolist() == [[0, 0, 0, 255], [51, 51, 51, 255]]
    np.save(tmp_path / "a.npy", np.ones((2, 2, 3), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert load_array(str(tmp_path / "A.NPY")).shape == (2, 2, 3)
    for wrong in (np.ones((2, 2, 3), np.complex64), np.ones((2, 0, 3), np.uint8)):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(BadImage, match="wrong.npy: pixels of type"):
            load_array(str(tmp_path / "wrong.npy"))


def test_orientation_is_applied_only_when_asked_for(tmp_path):
    img = Image.new("RGB", (8, 4), "red")
    exif = img.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    img.save(tmp_path / "turned.jpg", exif=exif)
    assert load_array(str(tmp_path / "turned.jpg")).shape == (4, 8, 3)
    assert load_array(str(tmp_path / "turned.jpg"), PixelSpec(exif=True)).shape == (8, 4, 3)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"not an image", None])
def test_unreadable_files_are_bad_images_that_name_themselves(content, tmp_path):
    file = tmp_path / "bad.png"
    file.write_bytes(decompression_bomb() if content is None else content)
    with pytest.raises(BadImage, match="bad.png"):
        load_array(str(file))


def test_a_loader_process_hands_a_users_error_over_without_its_traceback():
    trace = "Original Traceback (most recent call last):\n  File x\nutil.images.BadImage: a\n\n"
    wrapped = LocalError(f"Caught LocalError in worker process 0.\n{trace}util.errors.LocalError: a.png: bad\nmore\n")
    assert str(wrapped) == "a.png: bad\nmore"

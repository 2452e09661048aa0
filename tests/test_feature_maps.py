"""Pictures of features: components, attention and neighbours are what they are called."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import main_features
import models_vit
from util.errors import Incomplete, UserError
from util.report import feature_maps, knn, pictures

SIZES = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize("pool", [True, False])
@torch.no_grad()
def test_attention_is_the_class_tokens_of_the_last_block(pool):
    torch.manual_seed(0)
    encoder = models_vit.VisionTransformer(**SIZES, num_classes=0, global_pool=pool).eval()
    imgs, inputs = torch.randn(3, 3, 16, 24), []
    hook = encoder.blocks[-1].attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    expected = encoder.forward_features(imgs)
    hook.remove()
    tokens, attention = feature_maps.encode_with_attention(encoder, imgs)
    torch.testing.assert_close(tokens, expected)

    # The same by hand, from the block's weights.
    qkv = encoder.blocks[-1].attn.qkv(inputs[0]).view(3, 7, 3, 4, 8)  # [N, 1+L, 3, heads, D/heads]
    query, key = qkv[:, :, 0], qkv[:, :, 1]
    weights = torch.einsum("nihd,njhd->nhij", query, key).div(8**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention, weights[:, :, 0, 1:])
    # The model is as it was before.
    assert encoder.blocks[-1].attn.fused_attn == encoder.blocks[0].attn.fused_attn
    assert not encoder.blocks[-1].attn.attn_drop._forward_hooks


def test_components_are_scikit_learns_with_fixed_signs():
    tokens = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 16)
    flat = tokens.flatten(0, 1).numpy()
    peer = PCA(3, svd_solver="full").fit(flat)
    signs = np.sign(np.take_along_axis(peer.components_, np.abs(peer.components_).argmax(axis=1)[:, None], axis=1))
    projected = peer.transform(flat) * signs[:, 0]
    low, high = np.percentile(projected, [1, 99], axis=0)
    expected = torch.from_numpy(((projected - low) / (high - low)).clip(0, 1)).float().view(5, 12, 3)
    torch.testing.assert_close(feature_maps.principal_components(tokens), expected, atol=1e-4, rtol=0)


def test_tokens_without_differences_have_no_components():
    assert torch.equal(feature_maps.principal_components(torch.ones(2, 4, 8)), torch.zeros(2, 4, 3))


def test_heat_goes_from_black_over_red_and_yellow_to_white():
    colours = feature_maps.heat(torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]]))
    expected = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(colours, expected.expand(2, -1, -1))
    assert torch.equal(feature_maps.heat(torch.zeros(4)), torch.zeros(4, 3))  # attention may underflow


def test_a_patchs_colour_fills_its_pixels():
    torch.manual_seed(0)
    tokens, attention, imgs = torch.randn(2, 6, 32), torch.rand(2, 4, 6), torch.rand(2, 1, 16, 24)
    titles, panels = feature_maps.panels(tokens, attention, imgs, (2, 3), per_head=True)
    assert titles == ["image", "components", "attention", "head 1", "head 2", "head 3", "head 4"]
    assert panels.shape == (2, 7, 3, 16, 24) and panels.min() >= 0 and panels.max() <= 1
    assert torch.equal(panels[:, 0], imgs.expand(-1, 3, -1, -1))

    colours = panels[:, 1:].unflatten(3, (2, 8)).unflatten(5, (3, 8))  # [N, P, 3, h, p, w, p]
    assert torch.equal(colours, colours[..., :1, :, :1].expand_as(colours))
    per_patch = colours[:, :, :, :, 0, :, 0].flatten(3).transpose(2, 3)  # [N, P, L, 3]
    torch.testing.assert_close(per_patch[:, 0], feature_maps.principal_components(tokens))
    torch.testing.assert_close(per_patch[:, 1], feature_maps.heat(attention.mean(dim=1)))
    torch.testing.assert_close(per_patch[:, 4], feature_maps.heat(attention[:, 2]))


def test_no_image_is_its_own_neighbour():
    pool = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.5, 0.5], [-1.0, 0.0]])
    pool = torch.nn.functional.normalize(pool, dim=1)
    own = torch.tensor([0, 2])

    def nearest(features, candidates, own):
        return knn.nearest(candidates, features, 3, own)[1]

    assert nearest(pool[own], pool, own).tolist() == [[1, 3, 2], [3, 1, 0]]
    assert nearest(pool[own], pool, None).tolist() == [[0, 1, 3], [2, 3, 1]]
    assert nearest(pool[:1], pool[:2], torch.tensor([0])).tolist() == [[1]]
    assert nearest(pool[:1], pool[:1], torch.tensor([0])).shape == (1, 0)


def test_in_every_chunk_no_image_votes_for_itself():
    """Each feature is nearest to another class's: its own vote, which weighs most, would make it right."""
    features = torch.eye(6)[[0, 0, 1, 1, 2, 2]] + 0.1 * torch.eye(6)
    targets = torch.tensor([0, 1, 0, 1, 0, 1])
    for chunk in (2, 4, 1024):
        assert knn.accuracy(features, targets, features, targets, chunk=chunk, same=True) == 0
    assert knn.accuracy(features, targets, features, targets, chunk=2) == 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = models_vit.vit_demo_patch4(img_size=28, patch_size=7, num_classes=0, global_pool=False)
    file = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"model": model.state_dict(), "model_config": model.config}, file)
    return str(file)


def draw(checkpoint, folder, out, *more):
    words = [
        "--resume",
        checkpoint,
        "--data_path",
        folder,
        "--output",
        out / "f.npz",
        "--pictures",
        out / "f.png",
        *more,
    ]
    main_features.main([str(word) for word in [*words, "--device", "cpu"]])
    return Image.open(out / "f.png")


@pytest.mark.parametrize("tokens", ["pooled", "class", "all"])
def test_the_script_draws_a_row_per_image(tokens, checkpoint, images, tmp_path, capsys):
    picture = draw(checkpoint, images / "val", tmp_path, "--num", 5, "--tokens", tokens)
    assert "features of 5 images drawn in" in capsys.readouterr().out
    more = draw(checkpoint, images / "val", tmp_path, "--num", 4, "--tokens", tokens, "--heads")
    side = picture.height - more.height
    assert side > 160 and more.width == picture.width + 4 * side  # a column per head, square panels


def test_neighbours_come_from_the_other_folder(checkpoint, images, tmp_path, monkeypatch):
    """The images drawn are those of the largest cosine."""
    drawn = []
    monkeypatch.setattr(main_features.pictures, "grid", lambda rows, *_: drawn.append(rows) or Image.new("RGB", (1, 1)))
    draw(checkpoint, images / "train", tmp_path, "--crop_pct", 1)
    with np.load(tmp_path / "f.npz") as found:
        pool, names = found["features"], found["files"]
    draw(checkpoint, images / "val", tmp_path, "--crop_pct", 1, "--num", 3, "--neighbours", images / "train")
    with np.load(tmp_path / "f.npz") as found:
        features = found["features"][[0, 14, 29]]
    cosine = (features @ pool.T) / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(pool, axis=1)
    for row, order in zip(drawn[1], np.argsort(-cosine, axis=1), strict=True):
        for panel, number in zip(row[3:], order[:3], strict=True):
            with Image.open(images / "train" / names[number]) as file:
                pixels = torch.from_numpy(np.asarray(file.convert("L")) / 255).float()
            torch.testing.assert_close(panel, pixels.expand(3, -1, -1), atol=1e-5, rtol=0)

    # Of an image of which the others hold a copy, that is the nearest.
    shutil.copytree(images / "val", tmp_path / "copy")
    draw(checkpoint, images / "val", tmp_path, "--crop_pct", 1, "--num", 3, "--neighbours", tmp_path / "copy")
    assert torch.equal(drawn[2][:, 3], drawn[2][:, 0])


def test_neighbours_that_are_the_images_themselves_are_refused(checkpoint, images, tmp_path, refusal):
    said = refusal(lambda: draw(checkpoint, images / "val", tmp_path, "--neighbours", images / "val"))
    assert " and 27 more), which would be" in said and "their own neighbours: omit --neighbours" in said


def test_features_are_saved_before_neighbours_are_looked_for(checkpoint, images, tmp_path, monkeypatch):
    """Of many images that takes long."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_features.knn, "accuracy", stop)
    with pytest.raises(KeyboardInterrupt):
        draw(checkpoint, images / "val", tmp_path)
    with np.load(tmp_path / "f.npz") as found:
        assert len(found["features"]) == len(found["labels"]) == 30


def test_a_single_image_has_neighbours_among_others(checkpoint, images, tmp_path, capsys):
    shutil.copytree(images / "val" / "bag", tmp_path / "one" / "bag")
    for file in sorted((tmp_path / "one" / "bag").iterdir())[1:]:
        file.unlink()
    draw(checkpoint, tmp_path / "one", tmp_path, "--neighbours", images / "train")
    assert "k-NN among 80 images of train: " in capsys.readouterr().out


def test_one_class_has_no_accuracy(checkpoint, images, tmp_path, capsys):
    shutil.copytree(images / "val" / "bag", tmp_path / "one" / "bag")
    draw(checkpoint, tmp_path / "one", tmp_path)
    assert "k-NN" not in capsys.readouterr().out


def test_all_tokens_are_compared_by_the_mean_of_the_patches():
    tokens = torch.randn(2, 4, 8)
    assert torch.equal(main_features.Encoded(tokens, []).pooled(), tokens[:, 1:].mean(dim=1))
    assert torch.equal(main_features.Encoded(tokens[:, 0], []).pooled(), tokens[:, 0])


def test_batches_draw_what_one_batch_draws(checkpoint, images, tmp_path):
    one = np.asarray(draw(checkpoint, images / "val", tmp_path, "--num", 5)).astype(int)
    several = np.asarray(draw(checkpoint, images / "val", tmp_path, "--num", 5, "--batch_size", 2)).astype(int)
    assert np.abs(one - several).max() <= 1  # the order of sums


def test_a_single_image_has_no_neighbours(checkpoint, images, tmp_path):
    one = sorted((images / "val").rglob("*.png"))[:1]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / one[0].name).symlink_to(one[0].resolve())
    alone = draw(checkpoint, tmp_path / "one", tmp_path)
    among = draw(checkpoint, images / "val", tmp_path, "--num", 1)
    assert among.width > alone.width + 2 * 160 and among.height == alone.height


def test_unreadable_images_are_left_out(checkpoint, images, tmp_path):
    """Also among the neighbours; both folders' are counted."""
    for folder, split, count in (("few", "val", 3), ("others", "train", 5)):
        (tmp_path / folder / "bag").mkdir(parents=True)
        for file in sorted((images / split / "bag").iterdir())[:count]:
            (tmp_path / folder / "bag" / file.name).symlink_to(file.resolve())
        (tmp_path / folder / "bag" / "bad.png").write_bytes(b"no image")
    with pytest.raises(Incomplete, match=r"2 of 10 images cannot be read .*f.npz is made of the others"):
        draw(checkpoint, tmp_path / "few", tmp_path, "--neighbours", tmp_path / "others")
    picture = Image.open(tmp_path / "f.png")
    assert picture.height > 3 * 160 and picture.width > 6 * 160


def test_a_picture_too_large_for_its_format_ends_in_a_message(tmp_path):
    with pytest.raises(UserError, match=r"f.webp can't hold 2 x 16400 pixels .*draw fewer images, or a .png"):
        pictures.save(Image.new("RGB", (2, 16400)), tmp_path / "f.webp")
    for name, height in (("f.jpg", 65501), ("f.gif", 70000)):
        with pytest.raises(UserError, match=f"{name} can't hold 2 x {height} pixels"):
            pictures.save(Image.new("RGB", (2, height)), tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("f.txt", "--pictures .*f.txt does not end in an image format"), ("none/x/f.png", None), ("", "it is a folder")],
)
def test_a_picture_that_cannot_be_written_is_refused_first(name, message, checkpoint, images, tmp_path):
    words = ["--resume", checkpoint, "--data_path", images / "val", "--output", tmp_path / "f.npz"]
    words += ["--pictures", tmp_path / name, "--num", 1]
    if message is None:  # a folder that can be made
        main_features.main([str(word) for word in words])
        assert (tmp_path / name).is_file()
        return
    with pytest.raises(UserError, match=message):
        main_features.main([str(word) for word in words])
    assert not (tmp_path / "f.npz").exists()

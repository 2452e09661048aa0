r"""Fine-tune an encoder for semantic segmentation, under a DPT decoder of segmentation_models_pytorch.

    pip install segmentation_models_pytorch
    python main_export.py --resume output/pretrain/checkpoint-399.pth --to timm --output exported
    python recipes/segmentation/train.py --encoder exported --data_path DIR --classes 21 --size 224 \
        --output_dir output/segmentation
    python recipes/segmentation/train.py --encoder exported --predict PHOTOS --classes 21 --size 224 \
        --output_dir output/segmentation

DIR/{train,val}/images/** holds the images, and DIR/{train,val}/masks/** a PNG mask for each, under the same folder and
name. A mask's pixels are class numbers from 0; pixels of 255 are ignored. Images and masks are resized to --size, which
must suit the encoder's patches and the decoder: multiples of 32 with patches of 4, 8 or 16 pixels. The mean IoU on val/
is printed every --eval_freq epochs. The log (log.txt) and the weights (model.pth) are written to output_dir.
With --predict the trained model writes a mask for each image of a folder to output_dir/predicted.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from util import checks, errors
from util.checkpoint.configurations import read_config
from util.command_line import Parser
from util.data.images import BadImage, PixelSpec, load_array
from util.data.splits import is_image
from util.disk import write_whole
from util.distributed import dist
from util.errors import UserError, raise_problems

try:
    import segmentation_models_pytorch as smp
except ImportError:
    smp = None

IGNORED = 255


def get_args() -> argparse.Namespace:
    """Parse the flags and check them."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--encoder", required=True, type=Path, metavar="DIR", help="folder that main_export.py --to timm wrote")
    add("--scratch", action="store_true", help="take the encoder's shape only, with random weights, for comparison")
    add("--data_path", type=Path, metavar="DIR", help="folder with train/ and val/, described above")
    add("--predict", type=Path, metavar="DIR", help="write masks of these images instead of training")
    add("--classes", required=True, type=int, metavar="N", help="number of classes, the background among them")
    add("--size", required=True, type=int, metavar="SIDE", help="side of the images in pixels")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder of log.txt and model.pth")
    add("--overwrite", action="store_true", help="replace an earlier run in --output_dir")
    add("--epochs", default=30, type=int, help="length of the run")
    add("--eval_freq", default=1, type=int, metavar="N", help="evaluate every N epochs, and after the last one")
    add("--batch_size", default=32, type=int, help="images per batch")
    add("--lr", default=1e-3, type=float, help="peak learning rate of the decoder")
    add("--encoder_lr", default=0.3, type=float, metavar="SHARE", help="the encoder's share of --lr")
    add("--width", default=64, type=int, help="channels of the decoder")
    add("--num_workers", default=2, type=int, help="data loading processes")
    add("--seed", default=0, type=int, help="random seed")
    add("--device", default=dist.default_device(), help="cuda, mps or cpu")
    args = parser.parse_args()
    if smp is None:
        raise UserError("this needs segmentation_models_pytorch: pip install segmentation_models_pytorch")
    config = read_config(args.encoder)
    if not {"pretrained_cfg", "model_args"} <= config.keys():
        raise UserError(f"--encoder {args.encoder} is no export for timm: write one with main_export.py --to timm")
    patch = config["model_args"]["patch_size"]
    if args.size < 1 or args.size % patch:
        raise UserError(f"--size {args.size} must be a multiple of the encoder's patch size, {patch}")
    if not (args.data_path or args.predict):
        raise UserError("--data_path or --predict is needed")
    if not (2 <= args.classes <= IGNORED and min(args.epochs, args.eval_freq, args.batch_size, args.width) >= 1):
        raise UserError("--epochs, --eval_freq, --batch_size and --width must be at least 1, --classes 2 to 255")
    if args.encoder_lr < 0:
        raise UserError(f"--encoder_lr {args.encoder_lr} must be at least 0")
    if not args.predict and not args.overwrite and (args.output_dir / "log.txt").exists():
        raise UserError(f"--output_dir {args.output_dir} holds a run: choose another folder, or pass --overwrite")
    if args.predict and (args.output_dir / "predicted").resolve() == args.predict.resolve():
        raise UserError(f"--predict {args.predict} is where the masks are written: choose another --output_dir")
    raise_problems(checks.device_problems(args.device) + checks.range_problems(args))
    return args


class MaskedImages(Dataset):
    """Images and their masks: [C, S, S], of 8 bits or float, and class numbers [S, S]."""

    def __init__(
        self, root: Path, pixels: PixelSpec, classes: int, transform: v2.Transform, masked: bool = True
    ) -> None:
        """List the images.

        Args:
            root: Folder that holds images/ and masks/; if `masked` is False, a folder of images.
            pixels: Channels of the images.
            classes: Number of classes.
            transform: Resizes, and may flip, both alike.
            masked: Whether there are masks; else all masks are 0.

        Raises:
            UserError: There are no images, masks are missing, or two images have the same mask.
        """
        self.root = root / "images" if masked else root
        self.files = sorted(path for path in self.root.rglob("*") if path.is_file() and is_image(path.name))
        if not self.files:
            raise UserError(f"{self.root} holds no images")
        self.masks = [root / "masks" / path.relative_to(self.root).with_suffix(".png") for path in self.files]
        shared = [str(path) for path, count in Counter(self.masks).items() if count > 1]
        if shared:
            raise UserError(f"images in {self.root} that differ by their ending only have one mask, as {shared[0]}")
        missing = [str(path) for path in self.masks if masked and not path.is_file()]
        if missing:
            raise UserError(f"{len(missing)} masks are missing: {', '.join(missing[:3])}")
        self.pixels, self.classes, self.transform, self.masked = pixels, classes, transform, masked

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Load an image and its mask."""
        try:
            image = torch.from_numpy(load_array(str(self.files[index]), self.pixels)).permute(2, 0, 1)
        except BadImage as error:
            raise UserError(f"{error}: remove it") from error
        mask = self._load_mask(self.masks[index]) if self.masked else torch.zeros(image.shape[1:], dtype=torch.uint8)
        if mask.shape != image.shape[1:]:
            sizes = (" x ".join(map(str, shape)) for shape in (mask.shape, image.shape[1:]))
            raise UserError("{} is {} pixels and its image {}: make both alike".format(self.masks[index], *sizes))
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def _load_mask(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                mask, mode = np.array(file), file.mode
        except (OSError, ValueError, SyntaxError) as error:  # by which Pillow says that a file is damaged
            raise UserError(f"{path} cannot be read: {error}") from error
        if mask.ndim != 2:
            raise UserError(f"{path} is no mask: it has {mode} pixels, not one number each")
        wrong = np.setdiff1d(mask, [*range(self.classes), IGNORED])
        if len(wrong):
            raise UserError(f"{path} has class {wrong[0]}: --classes {self.classes} allows 0 to {self.classes - 1}")
        return torch.from_numpy(mask.astype(np.uint8))


class Segmenter(nn.Module):
    """An encoder under a DPT decoder: images [N, C, S, S], of 8 bits or from 0 to 1 -> logits [N, classes, S, S]."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model; the decoder's weights are random, the encoder's with --scratch, too."""
        super().__init__()
        data = read_config(args.encoder)["pretrained_cfg"]
        self.pixels = PixelSpec(data["input_size"][0], tuple(data["mean"]), tuple(data["std"]))
        self.net = smp.DPT(
            f"tu-local-dir:{args.encoder.resolve()}",
            encoder_weights=None if args.scratch else "pretrained",  # any name: the folder has one set of weights
            in_channels=self.pixels.channels,
            classes=args.classes,
            decoder_intermediate_channels=(args.width,) * 4,
            decoder_fusion_channels=args.width,
            img_size=args.size,  # timm resizes the positions
        )
        self.normalise = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.pixels.mean, self.pixels.std)]
        )
        self._check_size(args.size)

    @torch.no_grad()
    def _check_size(self, size: int) -> None:
        """Raise a UserError if the decoder can't join its maps of the patches of images of this size."""
        try:
            self.eval()(torch.zeros(1, self.pixels.channels, size, size))
        except RuntimeError as error:
            raise UserError(
                f"--size {size}: DPT can't join the maps of this size that the encoder's patches give. Multiples of 32 "
                "fit patches of 4, 8 and 16 pixels"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        return self.net(self.normalise(images))


@torch.inference_mode()
def mean_iou(model: Segmenter, loader: DataLoader, classes: int, device: str) -> tuple[float, list[float | None]]:
    """Return the mean IoU of the classes in per cent, over all pixels of all images, and each class's."""
    model.eval()
    sums = torch.zeros(3, classes, dtype=torch.long)
    for images, masks in loader:
        predicted = model(images.to(device)).argmax(dim=1).cpu()
        tp, fp, fn, _ = smp.metrics.get_stats(
            predicted, masks, mode="multiclass", num_classes=classes, ignore_index=IGNORED
        )
        sums += torch.stack([tp, fp, fn]).sum(dim=1)
    each = 100 * sums[0] / sums.sum(dim=0)
    # A class that is neither there nor predicted does not count.
    return each.nanmean().item(), [None if math.isnan(value) else value for value in each.tolist()]


def train(args: argparse.Namespace, model: Segmenter, resize: v2.Transform) -> None:
    """Train the model; at each evaluation write model.pth, and after every epoch a line into log.txt."""
    flip = v2.Compose([resize, v2.RandomHorizontalFlip()])
    train_images = MaskedImages(args.data_path / "train", model.pixels, args.classes, flip)
    val_images = MaskedImages(args.data_path / "val", model.pixels, args.classes, resize)
    batch_size = min(args.batch_size, len(train_images))
    loader = DataLoader(train_images, batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers)
    val_loader = DataLoader(val_images, args.batch_size, num_workers=args.num_workers)

    # The encoder, if it is pre-trained, needs smaller steps than the new decoder.
    encoder = list(model.net.encoder.parameters())
    decoder = [*model.net.decoder.parameters(), *model.net.segmentation_head.parameters()]
    rates = [args.lr * args.encoder_lr, args.lr]
    optimizer = torch.optim.AdamW([{"params": encoder}, {"params": decoder}], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=args.epochs * len(loader))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with (args.output_dir / "log.txt").open("w") as log:
        for epoch in range(args.epochs):
            model.train()
            total = 0.0
            for images, masks in loader:
                total += update(model, optimizer, images.to(args.device), masks.to(args.device))
                schedule.step()
            line = {"epoch": epoch, "train_loss": total / len(loader)}
            words = f"epoch {epoch}: loss {line['train_loss']:.4f}"
            if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
                miou, each = mean_iou(model, val_loader, args.classes, args.device)
                line |= {"test_miou": miou, "test_iou": each}
                words += f", mean IoU {miou:.2f} %"
                with write_whole(args.output_dir / "model.pth") as unfinished:
                    torch.save(model.net.state_dict(), unfinished)
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(words, flush=True)


def update(model: Segmenter, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor) -> float:
    """Make an update on a batch, and return its loss; without pixels that count there is none, and the loss is 0."""
    if (masks == IGNORED).all():
        return 0.0
    try:
        loss = F.cross_entropy(model(images), masks, ignore_index=IGNORED)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError("the decoder's BatchNorm has one value to go by: raise --batch_size or --size") from error
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def predict(args: argparse.Namespace, model: Segmenter, resize: v2.Transform) -> None:
    """Write a mask of class numbers, of --size, for each image of --predict to output_dir/predicted."""
    weights = args.output_dir / "model.pth"
    if not weights.is_file():
        raise UserError(f"{weights} does not exist: train first, with the same --output_dir")
    try:
        state = torch.load(weights, map_location=args.device, weights_only=True)
    except Exception as error:  # whatever torch and pickle raise at a damaged file
        raise UserError(f"{weights} can't be read ({type(error).__name__}): train again") from error
    try:
        model.net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{weights} is of another model than the flags describe: pass --encoder, --classes, --size and --width as "
            "in training"
        ) from error
    images = MaskedImages(args.predict, model.pixels, args.classes, resize, masked=False)
    model.eval()
    for file, (image, _) in zip(images.files, images, strict=True):
        target = args.output_dir / "predicted" / file.relative_to(args.predict).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask = model(image[None].to(args.device)).argmax(dim=1)[0]
        Image.fromarray(mask.byte().cpu().numpy()).save(target)
    print(f"{len(images)} masks in {args.output_dir / 'predicted'}")


def main() -> None:
    """Train, or predict with --predict."""
    args = get_args()
    torch.manual_seed(args.seed)
    model = Segmenter(args).to(args.device)
    resize = v2.Resize((args.size, args.size), antialias=True)  # of masks to the nearest
    (predict if args.predict else train)(args, model, resize)


if __name__ == "__main__":
    errors.run(main)

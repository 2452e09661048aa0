r"""Fine-tune an encoder for semantic segmentation, under a DPT decoder of segmentation_models_pytorch.

    pip install segmentation_models_pytorch
    python main_export.py --resume output/pretrain/checkpoint-399.pth --to timm --output exported
    python recipes/segmentation/train.py --encoder exported --data_path DIR --classes 21 --size 224 \
        --output_dir output/segmentation

DIR/{train,val}/images/** holds the images, DIR/{train,val}/masks/** a PNG for each, at the same place and of the same
name: of class numbers from 0, where 255 does not count. Images and masks are resized to --size, which the encoder's
patches must divide. Prints the mean IoU on val/ after every epoch; output_dir gets log.txt and model.pth, the weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from segmentation_models_pytorch.metrics import get_stats
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORED = 255


def get_args() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", required=True, type=Path, metavar="DIR", help="folder that main_export.py --to timm wrote")
    add("--scratch", action="store_true", help="take the encoder's shape only, with random weights, for comparison")
    add("--data_path", required=True, type=Path, metavar="DIR", help="folder with train/ and val/, described above")
    add("--classes", required=True, type=int, metavar="N", help="number of classes, the background among them")
    add("--size", required=True, type=int, metavar="SIDE", help="side of the images in pixels")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder of log.txt and model.pth")
    add("--epochs", default=30, type=int)
    add("--batch_size", default=32, type=int)
    add("--lr", default=1e-3, type=float, help="peak learning rate of the decoder")
    add("--encoder_lr", default=0.3, type=float, metavar="SHARE", help="the encoder's share of --lr")
    add("--width", default=64, type=int, help="channels of the decoder")
    add("--seed", default=0, type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for folder in (args.encoder / "config.json", args.data_path / "train", args.data_path / "val"):
        if not folder.exists():
            parser.error(f"{folder} does not exist")
    return args


class MaskedImages(Dataset):
    """Images and their masks: uint8 [C, S, S] and class numbers [S, S]."""

    def __init__(self, root: Path, channels: int, transform: v2.Transform) -> None:
        """List the images.

        Args:
            root: Folder with images/ and masks/.
            channels: 3 for colour, 1 for grey.
            transform: Resizes, and may flip, both alike.
        """
        self.files = sorted(path for path in (root / "images").rglob("*") if path.is_file())
        self.masks = [root / "masks" / path.relative_to(root / "images").with_suffix(".png") for path in self.files]
        missing = [str(path) for path in self.masks if not path.is_file()]
        if missing or not self.files:
            raise SystemExit(f"{root}: {len(self.files)} images; masks that are missing: {missing[:3]}")
        self.mode, self.transform = "RGB" if channels == 3 else "L", transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Load an image and its mask."""
        with Image.open(self.files[index]) as file:
            image = v2.functional.pil_to_tensor(file.convert(self.mode))
        with Image.open(self.masks[index]) as file:
            mask = torch.from_numpy(np.array(file))
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


class Segmenter(nn.Module):
    """An encoder under a DPT decoder: images of 8 bits [N, C, S, S] -> logits [N, classes, S, S]."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model; the decoder's weights are random, the encoder's with --scratch, too."""
        super().__init__()
        config = json.loads((args.encoder / "config.json").read_text())
        self.net = smp.DPT(
            f"tu-local-dir:{args.encoder.resolve()}",
            encoder_weights=None if args.scratch else "the folder's",
            in_channels=config["pretrained_cfg"]["input_size"][0],
            classes=args.classes,
            decoder_intermediate_channels=(args.width,) * 4,
            decoder_fusion_channels=args.width,
            img_size=args.size,  # timm resizes the positions
        )
        data = resolve_model_data_config(self.net.encoder.model)
        self.channels = data["input_size"][0]
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data["mean"], data["std"])])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        return self.net(self.normalise(images))


@torch.inference_mode()
def mean_iou(model: Segmenter, loader: DataLoader, classes: int, device: str) -> tuple[float, list[float]]:
    """Return the mean IoU of the classes in per cent, over all pixels of all images, and each class's."""
    model.eval()
    sums = torch.zeros(3, classes, dtype=torch.long)
    for images, masks in loader:
        predicted = model(images.to(device)).argmax(dim=1).cpu()
        tp, fp, fn, _ = get_stats(predicted, masks, mode="multiclass", num_classes=classes, ignore_index=IGNORED)
        sums += torch.stack([tp, fp, fn]).sum(dim=1)
    each = 100 * sums[0] / sums.sum(dim=0)
    return each.nanmean().item(), each.tolist()  # a class that is nowhere does not count


def main() -> None:
    """Train, and evaluate after every epoch."""
    args = get_args()
    torch.manual_seed(args.seed)

    # Model and data.
    model = Segmenter(args).to(args.device)
    resize = v2.Resize((args.size, args.size), antialias=True)  # of masks to the nearest
    train = MaskedImages(args.data_path / "train", model.channels, v2.Compose([resize, v2.RandomHorizontalFlip()]))
    val = MaskedImages(args.data_path / "val", model.channels, resize)
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(val, args.batch_size)

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
                logits = model(images.to(args.device))
                loss = F.cross_entropy(logits, masks.to(args.device), ignore_index=IGNORED)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            miou, each = mean_iou(model, val_loader, args.classes, args.device)
            line = {"epoch": epoch, "train_loss": total / len(loader), "test_miou": miou, "test_iou": each}
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(f"epoch {epoch}: loss {line['train_loss']:.4f}, mean IoU {miou:.2f} %", flush=True)
    torch.save(model.net.state_dict(), args.output_dir / "model.pth")


if __name__ == "__main__":
    main()

"""Pre-training from scratch beside Hugging Face's ViTMAE: the same data, steps, batches and seed.

    python benchmarks/from_scratch.py --data_path samples/fashion_mnist --epochs 20 --json from_scratch.json

Both are mae_vit_demo_patch4's shape at 28 pixels, AdamW and cosine schedule as in main_pretrain.py, normalised targets,
fp32. transformers' model is made from its configuration. The spread is that of masked predictions over the patches of
an image, as a share of the targets': a model that cannot tell where a patch was predicts nearly the same for all.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
from benchmarks.step import hf_model
from benchmarks.timing import device_name
from engine_pretrain import train_one_epoch
from util import datasets, loaders, optim
from util.amp import LossScaler
from util.augment import CentreCrop, Crop
from util.images import Pixels
from util.lr_sched import CosineSchedule

MODEL, SIZE = "mae_vit_demo_patch4", 28


class AsOurs(nn.Module):
    """Hugging Face's model, called as ours is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        out = self.model(pixel_values=imgs, noise=noise)
        return out.loss, out.logits, out.mask


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    ours = models_mae.MODELS[MODEL](img_size=SIZE, norm_pix_loss=True)
    return ours if name == "ours" else AsOurs(hf_model(ours.config))


def largest_position(model: nn.Module) -> float:
    """The largest value in the encoder's table of positions."""
    table = model.model.vit.embeddings.position_embeddings if isinstance(model, AsOurs) else model.pos_embed
    return table.abs().max().item()


@torch.no_grad()
def spread(model: nn.Module, imgs: Tensor) -> float:
    """Standard deviation of masked predictions over the patches of an image, as a share of the targets'."""
    target = models_mae.MODELS[MODEL](img_size=SIZE, norm_pix_loss=True).target(imgs)
    noise = torch.rand(len(imgs), target.shape[1], generator=torch.Generator().manual_seed(0))
    _, pred, mask = model.eval()(imgs, 0.75, noise)
    hidden = mask.bool()
    shares = [p[m].std(0).mean() / t[m].std(0).mean() for p, t, m in zip(pred, target, hidden, strict=True)]
    return torch.stack(shares).mean().item()


def main() -> None:
    """Train both, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--epochs", default=20, type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, pixels, rows = torch.device("cpu"), Pixels(), []
    val = datasets.open_split(datasets.EvalImages, args.data_path, "val", CentreCrop(SIZE, 1.0), pixels)
    imgs, _ = next(iter(loaders.eval_loader(val, 256, 0, False, device, False)))
    for name in ("ours", "hf"):
        model = build(name)
        start = largest_position(model)
        torch.manual_seed(1)  # the masks
        loader = loaders.train_loader(args.data_path, Crop(SIZE, (0.8, 1.0)), 64, 2, False, 0, pixels, device)
        lr = 1e-3
        optimizer = optim.pretrain_optimizer(model, lr, 0.05)
        schedule, scaler = CosineSchedule(lr, 0.0, 2, args.epochs), LossScaler("off", device)
        for epoch in range(args.epochs):
            loader.sampler.set_epoch(epoch)
            stats = train_one_epoch(model, loader, optimizer, device, epoch, scaler, schedule, print_freq=1000)
        rows.append({"name": name, "loss": stats["loss"], "spread": spread(model, imgs), "largest_position": start})
    print(f"{args.epochs} epochs of {len(loader) * 64} images, batch 64; {device_name(device)}")
    for row in rows:
        print(f"{row['name']:5}  loss {row['loss']:.4f}  spread {row['spread']:.3f}  "
              f"largest position at the start {row['largest_position']:.2f}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"epochs": args.epochs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Measure the time saved by leaving the masked patches out of the encoder, as in the paper's Table 2.

    python benchmarks/masking.py --models mae_vit_large_patch16 mae_vit_huge_patch14 --batch_size 4 --json masking.json

A step is forward pass, backward pass and update (AdamW) on random images that are on the device already; precision and
speed-ups are the scripts' defaults. The rows of a model:
    tokens     the baseline, whose encoder sees all patches, with a learned token in place of each masked one, and whose
               decoder has 8 blocks
    8, 1       MAE with a decoder of 8 blocks or of 1 block
Every repetition runs each row once. The ratio is the baseline's median time divided by the row's.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
from benchmarks.timing import Step, adamw, create_parser, device_name, interleave, spread, training_step, write_result
from util import errors, speed
from util.amp import LossScaler

# The speed-ups that the paper reports, by model and row.
PAPER = {"mae_vit_large_patch16": {"8": 2.8, "1": 3.7}, "mae_vit_huge_patch14": {"8": 3.5, "1": 4.1}}


class EncodesMaskTokens(models_mae.MaskedAutoencoderViT):
    """Baseline of the paper's Table 2 ("encoder w/ [M]"): mask tokens enter the encoder; the decoder adds none."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.encoder_mask_token = nn.Parameter(torch.randn(1, 1, self.config["embed_dim"]) * 0.02)

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode all patches, a learned token in place of each masked one.

        Args:
            imgs: Images [N, C, H, W].
            mask_ratio: Share of the patches that is masked.
            noise: Numbers [N, L] whose order decides which patches are masked; None: random numbers.

        Returns:
            latent [N, 1+L, D], mask [N, L] (1 where masked) and ids_restore [N, L].
        """
        x = self.patch_embed(imgs)  # [N, L, D]
        _, mask, ids_restore = self.random_masking(x[..., :1], mask_ratio, noise)  # only its mask is of use here
        x = torch.where(mask[..., None].bool(), self.encoder_mask_token.to(x.dtype), x) + self.pos_embed[:, 1:]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self._run_blocks(self.blocks, torch.cat([cls_token, x], dim=1))), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict the pixels of all patches; they are in image order already, so ids_restore is not used.

        latent [N, 1+L, D] -> pred [N, L, p*p*C].
        """
        x = self._run_blocks(self.decoder_blocks, self.decoder_embed(latent) + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def build(row: str, name: str, batch_size: int, device: torch.device) -> Step:
    """Build the training step of a row.

    Args:
        row: "tokens", "8" or "1".
        name: Name of the model in models_mae.MODELS.
        batch_size: Images per step.
        device: Device of the model.
    """
    # The model, prepared as main_pretrain.py does by default.
    factory = models_mae.MODELS[name]
    kind = EncodesMaskTokens if row == "tokens" else models_mae.MaskedAutoencoderViT
    arguments = factory.keywords | {"decoder_depth": 1 if row == "1" else 8, "norm_pix_loss": True}
    model, scaler = kind(**arguments).to(device).train(), LossScaler("auto", device)
    speed.prepare(model, device, scaler.amp, "auto", None, False)

    # A batch of random images.
    imgs = torch.randn(batch_size, 3, 224, 224, device=device)
    return training_step(model, adamw(model, fused=True), scaler, lambda: model(imgs, mask_ratio=0.75)[0])


def measure(name: str, args: argparse.Namespace) -> list[dict]:
    """Measure the rows of a model by turns; "paper" is 1.0 for the baseline and for models that PAPER lacks."""
    device = torch.device(args.device)
    steps = {row: build(row, name, args.batch_size, device) for row in ("tokens", "8", "1")}
    times = interleave(steps, device, args.steps)
    medians = {row: statistics.median(values) for row, values in times.items()}
    return [
        {
            "model": name,
            "row": row,
            "images_per_s": args.batch_size / medians[row],
            "ratio": medians["tokens"] / medians[row],
            "spread": spread(values),
            "paper": PAPER.get(name, {}).get(row, 1.0),
        }
        for row, values in times.items()
    ]


def main() -> None:
    """Measure all models, print the table, and write the JSON file."""
    parser = create_parser(__doc__, steps=5)
    parser.add_argument("--models", nargs="+", default=list(PAPER), choices=list(models_mae.MODELS))
    parser.add_argument("--batch_size", default=4, type=int)
    args = parser.parse_args()
    device = torch.device(args.device)

    # The models one after another, so that only one at a time takes memory.
    result = {
        "rows": [row for name in args.models for row in measure(name, args)],
        "batch_size": args.batch_size,
        "n": args.steps,
        "amp": LossScaler("auto", device).amp,
        "device": device_name(device),
        "torch": torch.__version__,
    }

    print(f"batch {args.batch_size}, n = {args.steps}, {result['amp']}; {result['device']}; torch {result['torch']}")
    print(f"{'':24} {'row':>7} {'images/s':>9} {'spread':>7} {'ratio':>6} {'paper':>6}")
    for row in result["rows"]:
        print(
            f"{row['model']:24} {row['row']:>7} {row['images_per_s']:9.3f} {row['spread']:7.1%} {row['ratio']:6.2f} "
            f"{row['paper']:6.1f}"
        )
    write_result(args.json, result)


if __name__ == "__main__":
    errors.run(main)

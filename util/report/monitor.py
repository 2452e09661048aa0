"""Monitoring of pre-training every few epochs: pictures of reconstructions, the loss under fixed masks, k-NN accuracy.

output_dir/
    reconstructions/epoch-0019.png    the same images each time
log.txt and TensorBoard: test_loss (masks fixed by seed and file name, so that epochs and runs compare), test_knn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from util import masking
from util.amp import LossScaler
from util.data.loaders import DeviceLoader, lockstep
from util.distributed import dist
from util.report import knn, pictures
from util.report.log import RunLog

PICTURES = 8  # images whose reconstructions are shown


@dataclass(frozen=True)
class FixedMasks:
    """Fixed masks under which a model is monitored.

    Attributes:
        ratio: Share of the patches that is removed.
        sampling: One of KINDS.
        seed: Fixes the masks, together with the images' names.
    """

    ratio: float
    sampling: str
    seed: int


class Monitor:
    """Monitoring of a pre-training run: a call measures the model on a fixed set of images.

    All ranks must call it; each measures its own share of the images.
    """

    def __init__(
        self,
        val: DeviceLoader | None,
        train: DeviceLoader,
        output_dir: str,
        log: RunLog,
        scaler: LossScaler,
        masks: FixedMasks,
    ) -> None:
        """Collect what the measurements need.

        Args:
            val: Validation images, divided among the ranks; None: there are none.
            train: Some training images, divided alike: k-NN's neighbours, and without val the source of the pictures.
            output_dir: Folder of the pictures; "": none are made.
            log: Takes the pictures for TensorBoard.
            scaler: Mixed precision.
            masks: The fixed masks of the loss and the pictures.
        """
        self.val, self.train, self.output_dir, self.log, self.scaler = val, train, output_dir, log, scaler
        self.masks = masks
        self.pictured: tuple[Tensor, list[str]] | None = None  # images [N, C, H, W] and their names, loaded once

    def __call__(self, model: nn.Module, epoch: int, poll: Callable[[], None]) -> dict[str, float]:
        """Measure the model, print the figures, and save a picture of reconstructions; the model is left in eval mode.

        Args:
            model: The autoencoder, in DDP where there are several ranks.
            epoch: Number of the epoch that ended, from 0.
            poll: Called once per batch, on all ranks equally often.

        Returns:
            "loss" on val, and "knn", the k-NN accuracy in per cent, where train and val have the same classes, more
            than one; {} without val.

        Raises:
            UserError: Too many images in a row can't be read (a single one is replaced by the next readable one), or
                the picture can't be written; on all ranks.
        """
        model = dist.unwrap(model).eval()
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training: not worth a compilation
            stats = self._measure(model, poll) if self.val is not None else {}
            dist.run_on_rank0(lambda: self._save_picture(model, epoch))
        if stats:
            listed = "  ".join(f"{name} {value:.4g}{' %' if name == 'knn' else ''}" for name, value in stats.items())
            dist.print_rank0(f"monitor after epoch {epoch}: {listed}")  # demo.py reads this line
        return stats

    def _noise(self, model: nn.Module, names: list[str], device: torch.device) -> Tensor:
        return masking.fixed_noise(self.masks.sampling, names, self.masks.seed, model.patch_embed.grid_size, device)

    @torch.inference_mode()
    def _measure(self, model: nn.Module, poll: Callable[[], None]) -> dict[str, float]:
        """Return "loss" on val, and "knn", the accuracy of k-NN in per cent, where both have the same classes, >= 2."""
        device = self.val.device
        features, targets, loss_sum = self._encode(model, self.val, poll, with_loss=True)
        train_features, train_targets, _ = self._encode(model, self.train, poll, with_loss=False)
        loss_sum, images = dist.sum_over_ranks([loss_sum, len(features)], device)
        stats = {"loss": loss_sum / images}

        # Every rank classifies its own share of val, by the neighbours of all ranks.
        classes = self.val.dataset.classes
        if len(classes) > 1 and classes == self.train.dataset.classes:
            gathered = dist.all_gather((train_features, train_targets))
            neighbours = [torch.cat(parts).to(device) for parts in zip(*gathered, strict=True)]
            weighted = 0.0
            if len(features):
                weighted = knn.accuracy(*neighbours, features.to(device), targets.to(device)) * len(features)
            stats["knn"] = dist.sum_over_ranks([weighted], device)[0] / images
        return stats

    def _encode(
        self, model: nn.Module, loader: DeviceLoader, poll: Callable[[], None], with_loss: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Encode this rank's images without masking.

        Returns:
            Features [M, D], the mean of the patch tokens, and classes [M], both on the CPU; and the sum of the images'
            losses under the fixed masks, 0 unless with_loss.
        """
        # Start with empty tensors: of a small folder a rank may have no image.
        features, classes = [torch.empty(0, model.pos_embed.shape[2])], [torch.empty(0, dtype=torch.long)]
        loss_sum = torch.zeros((), dtype=torch.float64)
        names = iter([loader.dataset.name(index) for index in loader.sampler])

        for batch in lockstep(loader):
            poll()
            if batch is None:  # other ranks still have batches
                continue
            imgs, targets = batch
            batch_names = list(islice(names, len(imgs)))
            with self.scaler.autocast():
                if with_loss:
                    noise = self._noise(model, batch_names, loader.device)
                    loss = model(imgs, mask_ratio=self.masks.ratio, noise=noise)[0]
                    loss_sum = loss_sum + loss.cpu().double() * len(imgs)
                # With a ratio of 0 and rising noise all patches stay, in their order.
                in_order = torch.arange(model.patch_embed.num_patches, device=loader.device).expand(len(imgs), -1)
                latent = model.forward_encoder(imgs, 0.0, in_order)[0]  # [N, 1+L, D]
            features.append(latent[:, 1:].float().mean(dim=1).cpu())
            # A copy: what a loader process sent would stay in shared memory, with an open file for each batch.
            classes.append(targets.to("cpu", copy=True))
        return torch.cat(features), torch.cat(classes), float(loss_sum)

    def _save_picture(self, model: nn.Module, epoch: int) -> None:
        """Save reconstructions of a few images, the same ones each time, to output_dir and TensorBoard."""
        if not self.output_dir:
            return
        loader = self.train if self.val is None else self.val
        if self.pictured is None:
            self.pictured = loader.sample_evenly(PICTURES)
        imgs, names = self.pictured
        noise = self._noise(model, names, loader.device)
        normalise = loader.normalise
        rows = pictures.reconstruct(model, imgs, self.masks.ratio, noise, normalise.mean, normalise.std)

        caption = [f"epoch {epoch}, {self.masks.ratio:.0%} masked ({self.masks.sampling})"]
        if model.norm_pix_loss:
            caption.append(pictures.NORMALISED)
        sheet = pictures.grid(rows, pictures.COLUMNS, caption)
        file = Path(self.output_dir) / "reconstructions" / f"epoch-{epoch:04d}.png"
        pictures.save(sheet, file)
        self.log.write_picture(epoch, "reconstructions", pil_to_tensor(sheet))

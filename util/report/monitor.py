"""What pre-training shows of itself every few epochs: a picture, the loss under fixed masks, a k-NN accuracy.

output_dir/
    reconstructions/epoch-0019.png    the same images each time
log.txt and TensorBoard: test_loss (masks fixed by seed and file name, so that epochs and runs compare), test_knn.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from util import masking
from util.amp import LossScaler
from util.checkpoint.output_dir import raise_write_errors
from util.data.loaders import DeviceLoader, lockstep
from util.distributed import dist
from util.masking import MaskSettings
from util.report import knn, pictures
from util.report.log import RunLog

PICTURES = 8


class Monitor:
    """Holds the images to look at; a call measures the model as it is. All ranks call, each sees its share of val."""

    def __init__(
        self,
        val: DeviceLoader | None,
        train: DeviceLoader,
        output_dir: str,
        log: RunLog,
        scaler: LossScaler,
        masks: MaskSettings,
    ) -> None:
        """Hold what is needed to look at a model.

        Args:
            val: Validation images, shared by the ranks, each once; None: there are none.
            train: Some training images, likewise: k-NN's neighbours and, where there is no val, the pictures.
            output_dir: Where pictures are written; "": nowhere.
            log: Gets the pictures for TensorBoard.
            scaler: Mixed precision.
            masks: The masks under which loss and pictures are made.
        """
        self.val, self.train, self.output_dir, self.log, self.scaler = val, train, output_dir, log, scaler
        self.masks = masks
        self.shown: Tensor | None = None

    def __call__(self, model: nn.Module, epoch: int, poll: Callable[[], None]) -> dict[str, float]:
        """Save the picture; returns the loss on val, and k-NN's accuracy (percent) where there are several classes.
        poll is called once per batch, on all ranks equally often."""
        model = dist.unwrap(model).eval()
        with torch.compiler.set_stance("force_eager"):  # shapes of its own are not worth a compilation
            stats = self._loss_and_neighbours(model, poll) if self.val is not None else {}
            dist.run_on_rank0(lambda: self._picture(model, epoch))
        if stats:
            words = "  ".join(f"{name} {value:.4g}" for name, value in stats.items())
            dist.print_rank0(f"monitor after epoch {epoch}: {words}")
        return stats

    def _noise(self, model: nn.Module, names: list[str], device: torch.device) -> Tensor:
        return masking.fixed_noise(self.masks.sampling, names, self.masks.seed, model.patch_embed.grid_size, device)

    @torch.inference_mode()
    def _loss_and_neighbours(self, model: nn.Module, poll: Callable[[], None]) -> dict[str, float]:
        device, total, images = self.val.device, torch.zeros((), dtype=torch.float64), 0
        found = {}
        for name, feed in (("val", self.val), ("train", self.train)):
            features = [torch.empty(0, model.pos_embed.shape[2])]  # a rank may have no image of a small folder
            classes = [torch.empty(0, dtype=torch.long)]
            order = [feed.dataset.name(index) for index in feed.sampler]
            for batch in lockstep(feed):
                poll()
                if batch is None:
                    continue
                imgs, targets = batch
                names, order = order[: len(imgs)], order[len(imgs) :]
                with self.scaler.autocast():
                    if name == "val":
                        noise = self._noise(model, names, device)
                        loss = model(imgs, mask_ratio=self.masks.ratio, noise=noise)[0]
                        total, images = total + loss.cpu().double() * len(imgs), images + len(imgs)
                    all_kept = torch.arange(model.patch_embed.num_patches, device=device).expand(len(imgs), -1)
                    latent = model.forward_encoder(imgs, 0.0, all_kept)[0]  # [N, 1+L, D]
                features.append(latent[:, 1:].float().mean(dim=1).cpu())
                classes.append(targets.cpu())
            found[name] = torch.cat(features), torch.cat(classes)
        total, images = dist.sum_over_ranks([float(total), images], device)
        stats = {"loss": total / images}
        if self.val.dataset.classes == self.train.dataset.classes and len(self.val.dataset.classes) > 1:
            shares = dist.gather(found["train"])
            neighbours = (torch.cat(parts).to(device) for parts in zip(*shares, strict=True))
            mine, targets = (x.to(device) for x in found["val"])
            right = knn.accuracy(*neighbours, mine, targets) * len(mine) if len(mine) else 0.0
            stats["knn"] = dist.sum_over_ranks([right], device)[0] / images
        return stats

    def _picture(self, model: nn.Module, epoch: int) -> None:
        if not self.output_dir:
            return
        feed = self.train if self.val is None else self.val
        if self.shown is None:
            self.shown, self.names = feed.some(PICTURES)
        noise = self._noise(model, self.names, feed.device)
        rows = pictures.reconstruct(model, self.shown, self.masks.ratio, noise, feed.normalise.mean, feed.normalise.std)
        caption = [f"epoch {epoch}, {self.masks.ratio:.0%} masked ({self.masks.sampling})"]
        sheet = pictures.grid(rows, caption + [pictures.NORMALISED] * model.norm_pix_loss)
        file = Path(self.output_dir) / "reconstructions" / f"epoch-{epoch:04d}.png"
        with raise_write_errors(file):
            file.parent.mkdir(exist_ok=True)
            sheet.save(file)
        self.log.picture(epoch, "reconstructions", pil_to_tensor(sheet))

"""Mixed precision: which one, the loss scaler, and the accumulation of gradients over micro-steps."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose(amp: str, device: torch.device) -> str:
    """Resolve --amp: "auto" is bf16 where the hardware does it fast, fp16 on older CUDA cards, else off."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast_on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # torch has no public name for it
    return "bf16" if device.type == "cpu" and fast_on_cpu() else "off"


class MicroStep(NamedTuple):
    """Where a batch stands in its accumulation group of `size` batches."""

    size: int
    first: bool
    last: bool


def micro_step(step: int, steps: int, accum_iter: int) -> MicroStep:
    """Batch `step` of an epoch of `steps`. The epoch's last group may be smaller than accum_iter; it makes an update
    of its own, averaged over the batches that it has, so that it is neither lost nor mis-scaled."""
    start = step - step % accum_iter
    size = min(accum_iter, steps - start)
    return MicroStep(size, first=step == start, last=step == start + size - 1)


class LossScaler:
    """Autocast, the loss scaling that fp16 needs, clipping and the optimiser's step. `state_dict` is torch's."""

    def __init__(self, amp: str, device: torch.device) -> None:
        """amp: --amp, "auto", "bf16", "fp16" or "off"."""
        self.amp = choose(amp, device)
        self.dtype, self.device_type = DTYPES[self.amp], device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip_grad: float | None
    ) -> None:
        """Apply the accumulated gradients, their global norm clipped to clip_grad if given, and clear them."""
        if clip_grad is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take a stored scaler; the empty one of a run without fp16 leaves a fresh one."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

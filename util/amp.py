"""Mixed precision: which one, the loss scaler, and the updates that were skipped."""

import time
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from util.distributed import dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose(amp: str, device: torch.device) -> str:
    """Resolve --amp: "auto" is bf16 where the hardware does it fast, fp16 on older CUDA cards, else off.

    All ranks must call, and take rank 0's answer.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and dist.run_on_rank0(bf16_is_faster_on_cpu) else "off"


@cache
def bf16_is_faster_on_cpu() -> bool:
    """Whether matrix products in bf16 take less than 3/4 of the time of those in fp32; a fifth of a second.

    Measured, since the instructions say little: with avx512_bf16 and without AMX it is twice as fast on a Zen 4 and
    half as fast on an Intel Xeon (2 cores each). By turns, so that what else the machine does hits both.
    """
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():  # torch has no public name for it
        return False
    matrices = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    best = {a.dtype: float("inf") for a in matrices}
    for _ in range(10):
        for a in matrices:
            start = time.perf_counter()
            a @ a
            best[a.dtype] = min(best[a.dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.75 * best[torch.float32]


class LossScaler:
    """Autocast, the loss scaling that fp16 needs, clipping and the optimiser's step. `state_dict` is torch's."""

    def __init__(self, amp: str, device: torch.device) -> None:
        """Set up a precision: --amp, "auto", "bf16", "fp16" or "off"."""
        self.device_type = device.type
        self.use(choose(amp, device))

    def use(self, amp: str) -> None:
        """Change the precision to "bf16", "fp16" or "off", before the first step."""
        self.amp, self.dtype = amp, DTYPES[amp]
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip_grad: float | None
    ) -> Tensor:
        """Apply the accumulated gradients, their global norm clipped to clip_grad if given, and clear them.

        Gradients that are not finite change nothing: neither parameters nor the optimiser's state. Returns whether
        that was so, as a boolean tensor: fused optimisers read it on the device, and nothing waits for it.
        """
        parameters = [p for p in parameters if p.grad is not None]
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = ~torch.isfinite(norm)
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        elif getattr(local := dist.local_optimizer(optimizer), "_step_supports_amp_scaling", False):
            local.found_inf = skipped.float()  # the way that GradScaler itself goes
            optimizer.step()
            del local.found_inf
        elif not skipped:
            optimizer.step()
        dist.zero_grad(optimizer)
        return skipped

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take a stored scaler; the empty one of a run without fp16 leaves a fresh one."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


class BadSteps:
    """Counts, on the device, the updates that were skipped; all ranks count alike, since they exchange gradients.

    An fp16 scaler starts high and halves itself at an overflow: what it can absorb, 16 in a row, does not count.
    """

    def __init__(self, limit: int, device: torch.device, amp: str) -> None:
        """limit: --max_bad_steps, how many in a row stop the run."""
        self.limit, self.absorbed = limit, 16 if amp == "fp16" else 0
        self.streak, self.count, self.first = (torch.zeros((), dtype=torch.long, device=device) for _ in range(3))
        self.tripped = torch.zeros((), dtype=torch.bool, device=device)

    def update(self, skipped: Tensor, step: int) -> None:
        """Take note of the update made at batch `step` of the epoch."""
        self.streak = torch.where(skipped, self.streak + 1, 0)
        counts = self.streak > self.absorbed
        self.first = torch.where(counts & (self.count == 0), step, self.first)
        self.count = self.count + counts
        self.tripped = self.tripped | (self.streak >= self.limit + self.absorbed)

    def read(self) -> tuple[int, int, bool]:
        """Since the last call: how many, the first one's batch, and whether the limit was met. Waits for the device."""
        count, first = self.count.item(), self.first.item()
        self.count = torch.zeros_like(self.count)
        return count, first, bool(self.tripped)

"""Mixed precision: the choice of the data type, fp16's loss scaling, and the count of skipped updates."""

import time
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from util.distributed import dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose(amp: str, device: torch.device) -> str:
    """Resolve --amp to "bf16", "fp16" or "off".

    "auto" is bf16 where the hardware computes it fast, fp16 on older CUDA cards, and off elsewhere. All ranks must
    call, and get the same answer: on a CPU rank 0 measures for all, and one older CUDA card makes it fp16 for all.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if all(dist.all_gather(torch.cuda.is_bf16_supported(including_emulation=False))) else "fp16"
    return "bf16" if device.type == "cpu" and dist.run_on_rank0(bf16_is_faster_on_cpu) else "off"


@cache
def bf16_is_faster_on_cpu() -> bool:
    """Return whether matrix products in bf16 take less than 3/4 of the time of those in fp32.

    Without avx512_bf16 they do not. With it they are measured, in a fifth of a second, since the instruction alone says
    little: without AMX bf16 is twice as fast on a Zen 4 and half as fast on an Intel Xeon (2 cores each).
    """
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():  # torch has no public name for it
        return False

    # The two types take turns, so that the machine's other work slows both; the fastest of ten counts.
    matrices = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    best = {matrix.dtype: float("inf") for matrix in matrices}
    for _ in range(10):
        for matrix in matrices:
            start = time.perf_counter()
            matrix @ matrix
            best[matrix.dtype] = min(best[matrix.dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.75 * best[torch.float32]


class LossScaler:
    """Mixed precision of a run: autocast, fp16's loss scaling, clipping, and steps that skip non-finite gradients.

    `state_dict` is that of torch's GradScaler: empty unless the precision is fp16.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        """Set up the precision.

        Args:
            amp: "auto", "bf16", "fp16" or "off", as --amp.
            device: Where the model is trained.
        """
        self.device_type = device.type
        self.use(choose(amp, device))

    def use(self, amp: str) -> None:
        """Change the precision to "bf16", "fp16" or "off", before the first step."""
        self.amp, self.dtype = amp, DTYPES[amp]
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass runs in this precision."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, which is scaled first with fp16."""
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip_grad: float | None
    ) -> Tensor:
        """Update the parameters with the accumulated gradients, and clear the gradients.

        Gradients that are not finite change neither parameters nor the optimiser's state; fp16's scale is halved.

        Args:
            optimizer: Over the parameters.
            parameters: All of the model's; those without a gradient are left out.
            clip_grad: Largest norm of all gradients together; None: no clipping.

        Returns:
            Whether the update was skipped, a boolean tensor on the device. Fused optimisers read it there, so that
            nothing waits for the device.
        """
        # Remove fp16's scale, so that the norm and the clipping refer to the true gradients.
        parameters = [p for p in parameters if p.grad is not None]
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = ~torch.isfinite(norm)
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)

        # fp16's scaler skips by itself, and a fused optimiser by the flag `found_inf` on the device, as GradScaler sets
        # it. Any other optimiser has to be asked on the host, which waits for the device.
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        elif getattr(local := dist.local_optimizer(optimizer), "_step_supports_amp_scaling", False):
            local.found_inf = skipped.float()
            optimizer.step()
            del local.found_inf
        elif not skipped:
            optimizer.step()

        dist.zero_grad(optimizer)
        return skipped

    def state_dict(self) -> dict:
        """Return the state of fp16's scaler; empty with another precision."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load the state of fp16's scaler; do nothing if it is empty, or if the precision here is not fp16."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


class BadSteps:
    """Watch for skipped updates: count those since the last report, and notice when `limit` in a row were skipped.

    The counts are kept on the device. All ranks count alike, since they exchange gradients. An fp16 scaler starts high
    and halves itself at every overflow: with fp16 the first 16 in a row are neither counted nor set against the limit.
    """

    def __init__(self, limit: int, device: torch.device, amp: str) -> None:
        """Start at zero.

        Args:
            limit: Counted updates in a row at which `read` reports the limit as reached (--max_bad_steps).
            device: Where the model is trained.
            amp: "bf16", "fp16" or "off".
        """
        self.limit, self.tolerated = limit, 16 if amp == "fp16" else 0
        self.streak, self.count, self.first = (torch.zeros((), dtype=torch.long, device=device) for _ in range(3))
        self.limit_reached = torch.zeros((), dtype=torch.bool, device=device)

    def update(self, skipped: Tensor, step: int) -> None:
        """Record whether the update made at batch `step` of the epoch was skipped, without waiting for the device."""
        self.streak = torch.where(skipped, self.streak + 1, 0)
        counts = self.streak > self.tolerated
        self.first = torch.where(counts & (self.count == 0), step, self.first)
        self.count = self.count + counts
        self.limit_reached = self.limit_reached | (self.streak >= self.limit + self.tolerated)

    def read(self) -> tuple[int, int, bool]:
        """Return what was counted, and set the number back to zero; waits for the device.

        Returns:
            The number of skipped updates since the last call, beyond those that fp16 is allowed, the batch of the first
            one (meaningless if there is none), and whether the limit was ever reached, in this or an earlier call.
        """
        count, first = self.count.item(), self.first.item()
        self.count = torch.zeros_like(self.count)
        return count, first, bool(self.limit_reached)

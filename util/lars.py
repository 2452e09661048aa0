"""LARS (You et al., arXiv 1708.03888), as linear probing of MAE uses it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum, whose gradients are scaled per matrix.

    Matrices: g <- g + weight_decay * w, then g <- g * trust_coefficient * |w| / |g| (factor 1 where a norm is 0).
    1-D parameters: plain momentum without decay. Then buffer <- momentum * buffer + g, w <- w - lr * buffer.
    Like torch's fused optimisers it reads its attribute `found_inf`, if set: a tensor, 1 if a step must do nothing.
    Written by hand because timm's divides by |g| + weight_decay * |w|, which is another step if there is weight decay.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        """Set up the optimiser.

        Args:
            params: Parameters, or parameter groups.
            lr: Learning rate.
            weight_decay: L2 penalty of the matrices.
            momentum: Share of the last step that is kept.
            trust_coefficient: Norm of a matrix's scaled gradient as a share of the matrix's own norm.
        """
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the gradients anew, and returns the loss, as torch's optimisers allow.

        Returns:
            The closure's loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = _scaled_gradient(parameter, group)
                buffer = self.state[parameter].setdefault("mu", torch.zeros_like(parameter))
                new_buffer = group["momentum"] * buffer + gradient
                new_parameter = parameter - group["lr"] * new_buffer

                # Choose on the device: to ask the flag on the host would wait for the GPU.
                if skip is not None:
                    new_buffer = torch.where(skip > 0, buffer, new_buffer)
                    new_parameter = torch.where(skip > 0, parameter, new_parameter)
                buffer.copy_(new_buffer)
                parameter.copy_(new_parameter)
        return loss


def _scaled_gradient(parameter: Tensor, group: dict) -> Tensor:
    """Return a vector's gradient as it is, and a matrix's with weight decay added and then scaled, as in LARS."""
    if parameter.ndim <= 1:
        return parameter.grad
    gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
    weight_norm, gradient_norm = parameter.norm(), gradient.norm()
    trust = group["trust_coefficient"] * weight_norm / gradient_norm
    scalable = (weight_norm > 0) & (gradient_norm > 0)
    return gradient * torch.where(scalable, trust, torch.ones_like(trust))

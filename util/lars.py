"""LARS (You et al., arXiv 1708.03888), as linear probing of MAE uses it."""

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise scaled SGD with momentum.

    Matrices: g <- g + weight_decay * w, then g <- g * trust_coefficient * |w| / |g| (factor 1 where a norm is 0).
    1-D parameters: plain momentum without decay. Then buffer <- momentum * buffer + g, w <- w - lr * buffer.
    Like torch's fused optimisers it takes `found_inf`, a tensor that is 1 where the step must change nothing.
    Written by hand: timm's divides by |g| + weight_decay * |w|, which is another step once there is weight decay.
    """

    def __init__(
        self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust_coefficient: float = 0.001
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    trust = group["trust_coefficient"] * weight_norm / update_norm
                    scalable = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(scalable, trust, torch.ones_like(trust))
                buffer = self.state[parameter].setdefault("mu", torch.zeros_like(parameter))
                after = group["momentum"] * buffer + update
                moved = parameter - group["lr"] * after
                if skip is not None:
                    after, moved = torch.where(skip > 0, buffer, after), torch.where(skip > 0, parameter, moved)
                buffer.copy_(after)
                parameter.copy_(moved)

"""Lion (Chen et al., arXiv:2302.06675): the sign of an interpolated momentum; one state tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Decoupled weight decay; `betas` interpolate the update and the momentum."""

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float, beta1: float, beta2: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                mean = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                update = torch.lerp(param.grad, mean, beta1).sign_()
                param.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                mean.lerp_(param.grad, 1 - beta2)

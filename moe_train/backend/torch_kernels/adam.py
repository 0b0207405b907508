"""Adam with TransformerEngine FusedAdam's interface, on torch's fused CPU kernel.

Megatron's optimizers are written for FusedAdam: one ``step`` per parameter group, moments in
chosen dtypes, an optional master copy of low-precision parameters, gradients read from
``decoupled_grad``. torch's own AdamW has none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

STATES = ("exp_avg", "exp_avg_sq", "master_param")


class TorchAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) or Adam on the host.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: decoupled weight decay; else L2 regularisation.
        exp_avg_dtype, exp_avg_sq_dtype: dtypes in which the moments are stored.
        master_weights: keep an fp32 (``master_weight_dtype``) copy and update that.
        use_decoupled_grad: read gradients from ``param.decoupled_grad``.
        capturable, bias_correction, store_param_remainders: accepted for FusedAdam's
            signature; graphs and remainder storage do not exist on the host.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weight_dtype: torch.dtype = torch.float32,
        store_param_remainders: bool = False,
    ) -> None:
        assert bias_correction and not capturable, "the host runs plain, uncaptured Adam"
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = False
        self.state_dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )

    def state_names(self) -> tuple[str, ...]:
        """Names of the per-parameter state tensors."""
        return STATES if self.master_weights else STATES[:2]

    @torch.no_grad()
    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Create zero moments, and the master copy when there is one, in ``param``'s shape."""
        for name in self.state_names():
            value = param.detach() if name == "master_param" else torch.zeros_like(param)
            self.state[param][name] = value.to(self.state_dtypes[name], copy=True)

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """State ``name`` of ``param`` in fp32, as TransformerEngine returns it."""
        return self.state[param][name].float()

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Store ``value`` as state ``name`` of ``param`` in the state's dtype."""
        if name not in self.state[param]:
            self.initialize_state(param)
        self.state[param][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if self._grad(p) is not None]
            for param in params:
                if not self.state[param]:
                    self.initialize_state(param)
            if params:
                self._update(group, params)

    def _grad(self, param: torch.Tensor) -> torch.Tensor | None:
        if self.use_decoupled_grad:
            return getattr(param, "decoupled_grad", None)
        return param.grad

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        # The kernel wants one dtype throughout; tensors already in fp32 are updated in place.
        working = {
            name: [self._source(param, name).float() for param in params]
            for name in ("param", "exp_avg", "exp_avg_sq")
        }
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        kernel(
            working["param"],
            [self._grad(p).float() for p in params],  # type: ignore[union-attr]
            working["exp_avg"],
            working["exp_avg_sq"],
            [],
            [torch.tensor(float(group["step"])) for _ in params],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=float(group["weight_decay"]),
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for name, values in working.items():
            for param, value in zip(params, values, strict=True):
                source = self._source(param, name)
                if value.data_ptr() != source.data_ptr():
                    source.copy_(value)
                if name == "param" and self.master_weights:
                    param.copy_(value)

    def _source(self, param: torch.Tensor, name: str) -> torch.Tensor:
        if name == "param":
            return self.state[param]["master_param"] if self.master_weights else param
        return self.state[param][name]

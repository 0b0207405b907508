"""Adam with TransformerEngine FusedAdam's interface, on torch's fused kernel of any device.

Megatron's optimizers are written for FusedAdam: one ``step`` per parameter group, moments in
chosen dtypes, an optional master copy of low-precision parameters, gradients read from
``decoupled_grad``. torch's own AdamW has none of these.

The kernel takes fp32 alone. What is stored in 16 bits is copied for it in parts, so that an update
of any size takes ``SCRATCH_BYTES`` more; what is fp32 already is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

STATES = ("exp_avg", "exp_avg_sq", "master_param")
WORKING = ("param", "grad", "exp_avg", "exp_avg_sq")
"""What the kernel works on."""
STORED = ("param", "exp_avg", "exp_avg_sq")
SCRATCH_BYTES = 128 << 20
"""Bytes of fp32 copies at a time."""
ALIGNED = 64
"""Elements that parts begin at multiples of: the CPU's kernel rounds what is left over after whole
vectors otherwise, and that must stay the end of a tensor."""


class TorchAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) or Adam.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: decoupled weight decay; else L2 regularisation.
        exp_avg_dtype, exp_avg_sq_dtype: dtypes in which the moments are stored.
        master_weights: keep an fp32 (``master_weight_dtype``) copy and update that.
        use_decoupled_grad: read gradients from ``param.decoupled_grad``.
        capturable, bias_correction, store_param_remainders: accepted for FusedAdam's
            signature; there are no graphs and no storage of remainders.
    """

    scratch_bytes = SCRATCH_BYTES

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
        assert bias_correction and not capturable, "torch's kernels run plain, uncaptured Adam"
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
            dtype = self.state_dtypes[name]
            if name == "master_param":
                self.state[param][name] = param.detach().to(dtype, copy=True)
            else:
                self.state[param][name] = torch.zeros_like(param, dtype=dtype)

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
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        # One for the whole group, and filled rather than copied: the device is not waited for.
        step = torch.full((), float(group["step"]), device=params[0].device)
        for batch in self._batches(params):
            kernel(
                [part.working["param"] for part in batch],
                [part.working["grad"] for part in batch],
                [part.working["exp_avg"] for part in batch],
                [part.working["exp_avg_sq"] for part in batch],
                [],
                [step] * len(batch),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=float(group["weight_decay"]),
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for part in batch:
                part.store()

    def _batches(self, params: list[torch.Tensor]) -> Iterator[list[_Part]]:
        """Parts of all parameters, as many at a time as their copies may be large."""
        batch: list[_Part] = []
        left = self.scratch_bytes
        for param in params:
            whole = self._tensors(param)
            copied = sum(4 for name in WORKING if whole[name].dtype != torch.float32)
            # Where nothing is copied a part is the whole tensor.
            length = max(1, self.scratch_bytes // (copied * ALIGNED)) * ALIGNED if copied else 0
            for start in range(0, param.numel(), length or max(1, param.numel())):
                part = _Part(whole, start, length or param.numel())
                if batch and part.copied_bytes > left:
                    yield batch
                    batch, left = [], self.scratch_bytes
                batch.append(part.load())
                left -= part.copied_bytes
        if batch:
            yield batch

    def _tensors(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the kernel reads and writes; ``rounded`` is a parameter that has a master copy."""
        state, grad = self.state[param], self._grad(param)
        assert grad is not None
        tensors = {
            "param": state["master_param"] if self.master_weights else param,
            "grad": grad.contiguous(),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }
        if self.master_weights:
            tensors["rounded"] = param
        assert all(t.is_contiguous() for t in tensors.values()), "parameters lie in buffers"
        return {name: tensor.view(-1) for name, tensor in tensors.items()}


class _Part:
    """A range of one parameter and its state: views where they are fp32, else copies."""

    def __init__(self, whole: dict[str, torch.Tensor], start: int, length: int) -> None:
        self.source = {name: flat[start : start + length] for name, flat in whole.items()}
        self.working: dict[str, torch.Tensor] = {}
        self.copied_bytes = sum(
            4 * self.source[name].numel()
            for name in WORKING
            if self.source[name].dtype != torch.float32
        )

    def load(self) -> _Part:
        """Make the copies; the kernel wants one dtype throughout."""
        self.working = {name: self.source[name].float() for name in WORKING}
        return self

    def store(self) -> None:
        """Write copies back in the state's dtype, and drop them."""
        for name in STORED:
            if self.source[name].dtype != torch.float32:
                self.source[name].copy_(self.working[name])
        if "rounded" in self.source:
            self.source["rounded"].copy_(self.working["param"])
        self.working.clear()

"""What an optimizer step holds beside weights, gradients and optimizer state.

Activations are gone by then. Gradients that are not fp32 are copied whole for an optimizer that
takes fp32 alone (Megatron-Core 0.19, ``_copy_model_grads_to_main_grads``); the precision-aware one
reads them as they are, and torch's kernels copy them with 16-bit moments in parts.
"""

from __future__ import annotations

from moe_train.config.root import Config
from moe_train.features.optimizers import OPTIMIZERS
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import WIDTH, owned_parameters
from moe_train.parallel.parameters import RankParameters
from moe_train.planner.terms import Term

SCRATCH_BYTES = 128 << 20
"""What torch's kernels copy at once; TorchAdam's own, which a test holds this to."""


def update_terms(
    config: Config, layout: Layout, held: RankParameters, *, fused: bool
) -> tuple[Term, ...]:
    """Buffers of the update on a rank that holds ``held``.

    Args:
        fused: TransformerEngine's optimizer, which copies nothing, or torch's kernels.
    """
    optim = config.optim
    owned = owned_parameters(config, layout, held)
    gradient = WIDTH[optim.grad_dtype] < 4
    if not optim.precision_aware:
        if not gradient:
            return ()
        return (
            Term(
                "fp32 copies of gradients", 4.0 * owned,
                "4 x parameters of this rank's share", "Megatron-Core 0.19, optimizer",
            ),
        )  # fmt: skip
    states = len(OPTIMIZERS[optim.name].state_names)
    copied = 4 * (gradient + states * (WIDTH[optim.moment_dtype] < 4))
    if fused or not copied:
        return ()
    return (
        Term(
            "parts copied to fp32", float(min(SCRATCH_BYTES, copied * owned)),
            f"128 MiB, or {copied} x parameters if less", "TorchAdam",
        ),
    )  # fmt: skip

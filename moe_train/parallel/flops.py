"""Floating-point operations of a training step, and the share of the peak that is reached.

Counted as in PaLM (arXiv:2204.02311, appendix B) and Megatron-LM's throughput report: the matrix
multiplications of the model's mathematics only. A multiply-add is 2 operations, the backward pass
costs twice the forward one, and recomputed activations do not count (that would be "hardware
utilisation"). Unlike PaLM's 12*L*H*Q*T, attention scores are counted under the causal mask: a token
looks at (T + 1) / 2 keys on average. Capacity padding and dropped tokens are not modelled.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from moe_train.config.model import ModelConfig

MULTIPLY_ADD = 2
FORWARD_AND_BACKWARD = 3
"""Backward needs the gradient of the inputs and of the weights: twice the forward pass."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Training operations (forward and backward) per token, over all layers, by part."""

    projections: float
    """Query, key, value and output projections."""
    scores: float
    """Query-key products and the weighted sum of values, causal."""
    router: float
    """Token-to-expert logits."""
    experts: float
    """SwiGLU of the k chosen experts."""
    shared_expert: float
    """SwiGLU of the shared expert."""
    head: float
    """Output logits."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(astuple(self)))


def flops_per_token(model: ModelConfig, sequence: int, vocab: int) -> FlopsPerToken:
    """Count one token's share of a training step.

    Args:
        model: the transformer.
        sequence: tokens per sequence (T); scores grow with it.
        vocab: rows of the output head; the useful ones, without padding.
    """
    per_layer = FORWARD_AND_BACKWARD * MULTIPLY_ADD * model.layers
    swiglu = 3 * model.hidden  # gate, up and down matrices, per unit of inner width
    return FlopsPerToken(
        projections=per_layer * model.hidden * (2 * model.query_width + 2 * model.kv_width),
        scores=per_layer * 2 * model.query_width * (sequence + 1) / 2,
        router=per_layer * model.hidden * model.experts,
        experts=per_layer * model.experts_per_token * swiglu * model.expert_hidden,
        shared_expert=per_layer * swiglu * model.shared_expert_hidden,
        head=FORWARD_AND_BACKWARD * MULTIPLY_ADD * model.hidden * vocab,
    )


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float | None:
    """Model FLOPs utilisation: the share, 0 to 1, of the peak of all devices together.

    Args:
        tokens_per_second: over all ranks.
        flops_per_token: ``FlopsPerToken.total``.
        peak_flops: FLOP/s of all devices in the compute dtype; 0 where no peak is known.

    Returns:
        None where no peak is known: a share of an unknown would be an invention.
    """
    if peak_flops <= 0:
        return None
    return tokens_per_second * flops_per_token / peak_flops

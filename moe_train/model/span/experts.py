"""This rank's experts at one local layer, for all pipeline stages."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.model.span.hosting import Host, Merged, Staged


class SpanExperts(MegatronModule):
    """Experts of global layers s * layers_per_stage + local layer, for every stage s.

    One grouped module holds them all, ordered by stage, where its products can be replayed
    (torch's kernels); else there is one module for each stage. Checkpoints are the same.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        builder: Any,
        stages: int,
        recompute: bool,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.stages = stages
        self.host: Host
        if replays(builder):
            self.merged = builder(stages * num_local_experts, config, pg_collection=pg_collection)
            # The activation between the products is made again in any case, and never kept.
            self.merged.activation_recompute = False
            # Probabilities on the input would need the input's values, which a replay has not.
            again = recompute or config.moe_apply_probs_on_input
            self.host = Merged(
                self.merged, stages, num_local_experts, config.hidden_size, recompute=again
            )
        else:
            self.by_stage = torch.nn.ModuleList(
                builder(num_local_experts, config, pg_collection=pg_collection)
                for _ in range(stages)
            )
            self.host = Staged(
                self.by_stage, num_local_experts, config.hidden_size, recompute=recompute
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Keys by global layer and expert, the same as with ``placement=stage``."""
        ((axis, layer, layers),) = sharded_offsets
        per_stage = layers // self.stages
        places = [
            ((axis, stage * per_stage + layer % per_stage, layers),) for stage in range(self.stages)
        ]
        if not hasattr(self, "by_stage"):
            return _under(prefix, "merged", self.merged.sharded_parts(prefix, places))
        state: dict[str, Any] = {}
        modules: list[Any] = list(self.by_stage)
        for stage, experts in enumerate(modules):
            part = experts.sharded_state_dict(prefix, places[stage], metadata)
            state.update(_under(prefix, f"by_stage.{stage}", part))
        return state


def replays(builder: Any) -> bool:
    """Whether a provider's builder of grouped experts makes modules that can be replayed."""
    return getattr(getattr(builder, "func", builder), "replays", False)


def _under(prefix: str, module: str, state: dict[str, Any]) -> dict[str, Any]:
    """Names of a submodule's own state."""
    assert all(name.startswith(prefix) for name in state)
    return {f"{prefix}{module}.{name[len(prefix) :]}": value for name, value in state.items()}

"""Grouped experts: one matrix product for all local experts of a layer.

Megatron's local provider falls back to one small GEMM per expert. Here Megatron's own
``TEGroupedMLP`` (activation, probabilities, selective recompute) runs on stacked weights and
grouped products. Checkpoint keys, global shapes and offsets are those of TE's provider.

Shape letters: E local experts, T routed tokens of this rank, I input and O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.backend.torch_kernels.devices import weight_device
from moe_train.backend.torch_kernels.products import grouped_linear
from moe_train.backend.torch_kernels.replay import Tape


class TorchGroupedLinear(torch.nn.Module):
    """E linear maps with stacked weights [E, O, I]; ``partition_dim`` is split over ETP.

    The communication of expert tensor parallelism is the token dispatcher's, as with TE's
    grouped linear, so this is a local product.
    """

    partition_dim: int
    tape: Tape | None = None
    """Set for one pass whose products are recorded or replayed."""

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        /,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert is_expert and not bias
        assert not config.delay_wgrad_compute, "torch's kernels do not delay weight gradients"
        tp_size = pg_collection.expt_tp.size()
        shape = [num_local_experts, output_size, input_size]
        shape[self.partition_dim] //= tp_size
        weight = torch.empty(*shape, dtype=config.params_dtype, device=weight_device(config))
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            for expert in range(num_local_experts):
                init_method(self.weight.data[expert])
        set_tensor_model_parallel_attributes(self.weight, True, self.partition_dim, 1)
        # Same rule as Megatron's own linear layers: an expert's gradient is reduced over the
        # expert-data-parallel group only where that differs from the data-parallel group.
        self.weight.allreduce = not (  # type: ignore[attr-defined]
            config.expert_model_parallel_size > 1
            or config.tensor_model_parallel_size != config.expert_tensor_parallel_size
        )

    def forward(
        self, x_TI: torch.Tensor, tokens_per_expert: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [T, O] and no bias; rows of ``x_TI`` are sorted by expert."""
        if self.tape is not None:
            return self.tape.product(self.weight, x_TI, tokens_per_expert), None
        return grouped_linear(x_TI, self.weight, tokens_per_expert), None

    def backward_dw(self) -> None:
        """Nothing was delayed."""


class TorchColumnGroupedLinear(TorchGroupedLinear):
    """First expert matrix: output rows are split over expert tensor parallelism."""

    partition_dim = 1


class TorchRowGroupedLinear(TorchGroupedLinear):
    """Second expert matrix: input columns are split over expert tensor parallelism."""

    partition_dim = 2


class TorchGroupedMLP(TEGroupedMLP):
    """Megatron's grouped SwiGLU experts over stacked weights."""

    replays = True
    """Its products can be recorded and replayed (:mod:`.replay`)."""

    def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.expert_data_rank = pg_collection.expt_dp.rank()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Sharded tensors with TE's keys: ``experts.linear_fc{1,2}.weight``, [.., E, O, I]."""
        return self.sharded_parts(prefix, [sharded_offsets])

    def sharded_parts(self, prefix: str, places: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """The same where the experts of several layers are stacked in equal parts.

        Args:
            places: sharded offsets of each part.
        """
        replica = (0, 0, self.expert_data_rank)
        state: dict[str, Any] = {}
        for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            # Gate and up are two blocks of fc1's rows, each split over expert tensor parallelism.
            blocks = 2 if name == "linear_fc1" and self.config.gated_linear_unit else 1
            shard = partial(self._shard, linear.partition_dim, blocks, replica)
            key, weight = f"{prefix}experts.{name}.weight", linear.weight
            if blocks == len(places) == 1:
                state[f"{prefix}{name}.weight"] = shard(key, weight, places[0], 0)
                continue

            def build(
                key: str,
                data: torch.Tensor,
                replica_id: Any,
                flattened_range: Any,
                blocks: int = blocks,
                shard: Any = shard,
            ) -> list[ShardedTensor]:
                return [
                    shard(key, piece, place, block)
                    for part, place in zip(data.chunk(len(places)), places, strict=True)
                    for block, piece in enumerate(part.chunk(blocks, dim=1))
                ]

            def merge(pieces: list[torch.Tensor], blocks: int = blocks) -> torch.Tensor:
                parts = [
                    torch.cat(pieces[first : first + blocks], dim=1)
                    for first in range(0, len(pieces), blocks)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)

            state[f"{prefix}{name}.weight"] = ShardedTensorFactory(
                key, weight, build, merge, replica
            )
        return state

    def _shard(
        self,
        partition_dim: int,
        blocks: int,
        replica: tuple[int, int, int],
        key: str,
        data: torch.Tensor,
        place: tuple[Any, ...],
        block: int,
    ) -> ShardedTensor:
        axes, tp_size = len(place), self.tp_group.size()
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *place,
            (axes, self.ep_group.rank(), self.ep_group.size()),
            (axes + partition_dim, block * tp_size + self.tp_group.rank(), blocks * tp_size),
            replica_id=replica,
            prepend_axis_num=axes,
        )

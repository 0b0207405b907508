"""Communicator settings of single process groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.types import Bool, NonNegativeInteger, PositiveInteger
from moe_train.errors import ConfigError

GroupName = Literal[
    "tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "tp_cp", "tp_dp", "tp_dp_cp",
    "ep", "ep_tp", "ep_dp", "tp_ep_mp", "tp_ep_pp",
]  # fmt: skip
"""Groups by their names in Megatron's ``initialize_model_parallel``; with ``placement=span``
tokens are exchanged in ``mp``."""


@dataclass(frozen=True)
class NcclGroup:
    """NCCL's settings of one group's communicator; what is null is NCCL's own choice."""

    min_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Fewest thread blocks of a collective's kernel."""
    max_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Most thread blocks: fewer leave more of the GPU to computing that overlaps."""
    cga_cluster_size: Annotated[NonNegativeInteger, Field(le=8)] | None = None
    """Thread blocks in a cluster, 0 to 8 (Hopper and later)."""
    net_name: Literal["IB", "socket"] | None = None
    """IB | socket."""
    is_high_priority_stream: Bool = False
    """Run on a stream that the GPU prefers."""


def faults(groups: Mapping[GroupName, NcclGroup]) -> Iterator[ConfigError]:
    """Contradictions in ``backend.nccl_groups``."""
    for name, group in groups.items():
        if group.min_ctas and group.max_ctas and group.min_ctas > group.max_ctas:
            yield ConfigError(
                f"backend.nccl_groups.{name}.min_ctas",
                f"{group.min_ctas} exceeds max_ctas={group.max_ctas}",
                f"at most {group.max_ctas}",
            )

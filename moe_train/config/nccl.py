"""Communicator settings of single process groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_train.config.convert import nearest
from moe_train.errors import ConfigError

GROUPS = (
    *("tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "tp_cp", "tp_dp", "tp_dp_cp"),
    *("ep", "ep_tp", "ep_dp", "tp_ep_mp", "tp_ep_pp"),
)
"""Groups by the names that Megatron's ``initialize_model_parallel`` knows them by; ``mp`` is the
group that a spanning run exchanges tokens in."""
NETWORKS = ("IB", "socket")


@dataclass
class NcclGroup:
    """NCCL's settings of one group's communicator; what is null is NCCL's own choice."""

    min_ctas: int | None = None
    """Fewest thread blocks of a collective's kernel."""
    max_ctas: int | None = None
    """Most thread blocks: fewer leave more of the GPU to computing that overlaps."""
    cga_cluster_size: int | None = None
    """Thread blocks in a cluster, 0 to 8 (Hopper and later)."""
    net_name: str | None = None
    """IB | socket."""
    is_high_priority_stream: bool = False
    """Run on a stream that the GPU prefers."""


def faults(groups: Mapping[str, NcclGroup]) -> Iterator[ConfigError]:
    """What is wrong with ``backend.nccl_groups``."""
    for name, group in groups.items():
        key = f"backend.nccl_groups.{name}"
        if name not in GROUPS:
            close = nearest(name, list(GROUPS), 1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield ConfigError(key, "is no process group", hint + "groups: " + ", ".join(GROUPS))
        for field, low, high in (
            ("min_ctas", 1, 64),
            ("max_ctas", 1, 64),
            ("cga_cluster_size", 0, 8),
        ):
            value = getattr(group, field)
            if value is not None and not low <= value <= high:
                yield ConfigError(f"{key}.{field}", f"{value} is refused", f"{low} to {high}")
        if group.min_ctas and group.max_ctas and group.min_ctas > group.max_ctas:
            yield ConfigError(
                f"{key}.min_ctas", f"{group.min_ctas} exceeds max_ctas", f"at most {group.max_ctas}"
            )
        if group.net_name is not None and group.net_name not in NETWORKS:
            yield ConfigError(
                f"{key}.net_name", f"{group.net_name!r} is not a choice", " or ".join(NETWORKS)
            )

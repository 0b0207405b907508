"""One object that knows every rank's coordinates, groups, layers and experts.

Rank numbering is Megatron-Core's default order "tp-cp-ep-dp-pp" (fastest first), which
it applies twice: to the dense grid tp x cp x dp x pp and to the expert grid
etp x ep x edp x pp (``parallel_state.RankGenerator``, 0.19). Both grids have the
pipeline slowest, so a stage is the same block of ranks in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from moe_train.config.types import Placement

DENSE_GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp_cp": ("cp", "dp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "mp": ("tp", "pp"),
}
"""Process groups of the dense grid by the axes along which their ranks differ."""

EXPERT_GROUPS: dict[str, tuple[str, ...]] = {
    "ep": ("ep",),
    "etp": ("etp",),
    "edp": ("edp",),
    "tp_ep": ("etp", "ep"),
    "tp_ep_pp": ("etp", "ep", "pp"),
}
"""Process groups of the expert grid (``placement=stage``)."""

GROUP_KINDS = (*DENSE_GROUPS, "embd", *EXPERT_GROUPS)
"""Every kind that `Layout.groups` knows."""


class DenseCoordinates(NamedTuple):
    """Position of a rank in the dense grid."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """Position of a rank in the expert grid."""

    etp: int
    ep: int
    edp: int
    pp: int


class Coordinates(NamedTuple):
    """Both positions of one rank."""

    dense: DenseCoordinates
    expert: ExpertCoordinates


@dataclass(frozen=True)
class Layout:
    """Sizes of all parallel dimensions over `world` ranks, and what follows from them.

    A layout is only arithmetic: `moe_train.planner.legality` says whether it is legal.
    `layers` and `experts` (per layer) are needed by `stage_layers` and `local_experts`.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    placement: Placement = "stage"
    layers: int = 0
    experts: int = 0

    @property
    def span(self) -> bool:
        """Whether experts spread over all stages of a replica."""
        return self.placement == "span"

    @property
    def expert_in_stage(self) -> int:
        """Expert-parallel ranks inside one stage: with span, the tensor-parallel ones.

        This is the size that Megatron is told; its expert-data-parallel groups are then those
        of the replicas in both placements.
        """
        return self.tensor if self.span else self.expert

    @property
    def data(self) -> int:
        """Data-parallel replicas of the dense parts."""
        return self.world // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        stages = 1 if self.span else self.pipeline
        return self.world // (self.expert_tensor * self.expert * stages)

    @property
    def tag(self) -> str:
        """Short name such as ``TP2.PP4.EP2``; ``single`` for one rank.

        DP counts the copies of the larger of the two grids, so that the tag together
        with nothing else gives the world size.
        """
        if self.world == 1:
            return "single"
        stages = 1 if self.span else self.pipeline
        dense = self.tensor * self.context * (self.pipeline if self.span else 1)
        copies = self.world // (max(dense, self.expert_tensor * self.expert) * stages)
        parts = (
            ("DP", copies),
            ("TP", self.tensor),
            ("CP", self.context),
            ("PP", self.pipeline),
            ("VPP", self.virtual_pipeline),
            ("EP", self.expert),
            ("ETP", self.expert_tensor),
        )
        text = ".".join(f"{name}{size}" for name, size in parts if size > 1)
        return text + (".span" if self.span else "")

    def overrides(self) -> list[str]:
        """The layout as config overrides that can be pasted on a command line."""
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            *([f"parallel.context={self.context}"] if self.context > 1 else []),
            *(
                [f"parallel.virtual_pipeline={self.virtual_pipeline}"]
                if self.virtual_pipeline > 1
                else []
            ),
            f"parallel.expert={self.expert}",
            *([f"parallel.expert_tensor={self.expert_tensor}"] if self.expert_tensor > 1 else []),
            f"parallel.placement={self.placement}",
        ]

    def coordinates(self, rank: int) -> Coordinates:
        """Dense and expert coordinates of `rank` (0-based).

        Under ``placement=span`` the expert index runs over the replica's tensor ranks,
        then its stages, and expert replicas over context and data ranks.
        """
        assert 0 <= rank < self.world, f"rank {rank} outside a world of {self.world}"
        rest, tp = divmod(rank, self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        dense = DenseCoordinates(tp, cp, dp, pp)
        if self.span:
            ep, edp = tp + self.tensor * pp, cp + self.context * dp
            return Coordinates(dense, ExpertCoordinates(0, ep, edp, pp))
        rest, etp = divmod(rank, self.expert_tensor)
        rest, ep = divmod(rest, self.expert)
        pp, edp = divmod(rest, self.expert_data)
        return Coordinates(dense, ExpertCoordinates(etp, ep, edp, pp))

    @cached_property
    def _all_coordinates(self) -> list[Coordinates]:
        return [self.coordinates(rank) for rank in range(self.world)]

    def groups(self, kind: str) -> list[list[int]]:
        """All process groups of one kind, each an ascending list of ranks.

        Kinds: tp, cp, dp, pp, dp_cp, tp_cp, tp_dp_cp, mp (one dense replica), embd
        (first and last stage), ep, etp, edp, tp_ep, tp_ep_pp. The order of the groups
        is that of Megatron's.
        """
        assert kind in GROUP_KINDS, f"unknown group kind {kind}"
        if kind == "embd":
            return [
                [ranks[0], ranks[-1]] if len(ranks) > 1 else [ranks[0]]
                for ranks in self.groups("pp")
            ]
        axes = DENSE_GROUPS.get(kind) or EXPERT_GROUPS[kind]
        # Under span the expert index already runs over the stages.
        inside = {*axes, "pp"} if self.span and "ep" in axes else set(axes)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, both in enumerate(self._all_coordinates):
            grid = both.dense if kind in DENSE_GROUPS else both.expert
            fixed = tuple(
                value for axis, value in zip(grid._fields, grid, strict=True) if axis not in inside
            )
            found.setdefault(fixed, []).append(rank)
        return list(found.values())

    def stage_layers(self, stage: int, chunk: int | None = None) -> list[int]:
        """1-based layers of pipeline stage `stage`, of one model chunk or of all.

        Interleaving deals chunks round-robin (Megatron's
        ``get_transformer_layer_offset``): chunk c of stage s starts after
        c * layers / chunks + s * layers / (chunks * stages) layers.
        """
        per_chunk = self.layers // (self.pipeline * self.virtual_pipeline)
        chunks = range(self.virtual_pipeline) if chunk is None else (chunk,)
        layers: list[int] = []
        for index in chunks:
            first = index * (self.layers // self.virtual_pipeline) + stage * per_chunk
            layers.extend(range(first + 1, first + per_chunk + 1))
        return layers

    def local_experts(self, rank: int) -> range:
        """0-based experts of each hosted layer that live on `rank`."""
        each = self.experts // self.expert
        index = self.coordinates(rank).expert.ep
        return range(index * each, (index + 1) * each)

    def expert_layers(self, rank: int) -> list[int]:
        """1-based layers of which `rank` hosts experts: its stage's, or all under span."""
        if self.span:
            return list(range(1, self.layers + 1))
        return self.stage_layers(self.coordinates(rank).dense.pp)

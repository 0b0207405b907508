"""`Layout`: the parallel sizes of a run, and every rank's coordinates, groups, layers and experts.

Rank numbering is Megatron-Core's default order "tp-cp-ep-dp-pp" (fastest first), which
it applies twice: to the dense grid tp x cp x dp x pp and to the expert grid
etp x ep x edp x pp (``parallel_state.RankGenerator``, 0.19). Both grids have the
pipeline slowest, so a stage is the same block of ranks in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

from moe_train.config.types import Placement
from moe_train.parallel.stages import text_of


class GroupKind(NamedTuple):
    """A kind of process group: the axes along which its ranks differ, and what it communicates."""

    axes: tuple[str, ...]
    """Of the dense grid (tp, cp, dp, pp) or the expert grid (etp, ep, edp, pp), fastest first."""
    traffic: str = ""
    """Communication pattern; empty where a training step moves no tensors of the model."""


GROUPS = {
    "tp": GroupKind(("tp",), "all-gather and reduce-scatter of activations, every layer"),
    "cp": GroupKind(("cp",), "ring exchange of keys and values, every layer"),
    "dp": GroupKind(("dp",)),
    "pp": GroupKind(("pp",), "activations to the next stage, gradients back, every micro-batch"),
    "dp_cp": GroupKind(("cp", "dp"), "reduction of dense gradients, once a step"),
    "tp_cp": GroupKind(("tp", "cp")),
    "tp_dp_cp": GroupKind(("tp", "cp", "dp")),
    "mp": GroupKind(("tp", "pp"), "gradient norm and agreement within a replica, once a step"),
    "embd": GroupKind(("pp",), "sum of a tied embedding's gradients, once a step"),
    "ep": GroupKind(("ep",), "all-to-all of tokens, twice a layer in each direction"),
    "etp": GroupKind(("etp",), "all-gather and reduce-scatter of an expert's tokens, every layer"),
    "edp": GroupKind(("edp",), "reduction of expert gradients, once a step"),
    "tp_ep": GroupKind(("etp", "ep")),
    "tp_ep_pp": GroupKind(("etp", "ep", "pp")),
}
"""Every kind of process group, by Megatron-Core's names. ``embd`` has the first and the last rank
of each ``pp`` group."""


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def ranges(numbers: list[int], separator: str = ",") -> str:
    """Ascending numbers as text: ``1-4`` or ``1-2,9-10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


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

    A layout is arithmetic; `moe_train.parallel.rules` checks whether it is legal.
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
    stages: tuple[int, ...] = ()
    """Layers of each slot (chunk c of stage s is slot c x pipeline + s); empty is an even share."""
    mtp_layers: int = 0
    """Multi-token-prediction layers, numbered after `layers`, in the last slot."""

    @property
    def span(self) -> bool:
        """Whether experts spread over all stages of a replica."""
        return self.placement == "span"

    @property
    def expert_stages(self) -> int:
        """Pipeline stages that have experts of their own: all, or 1 where experts span them."""
        return 1 if self.span else self.pipeline

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage, of all replicas; ranks of a stage are consecutive."""
        return self.world // self.pipeline

    def stage_ranks(self, stage: int) -> range:
        """Ranks of pipeline stage `stage` (0-based)."""
        return range(stage * self.ranks_per_stage, (stage + 1) * self.ranks_per_stage)

    @property
    def expert_in_stage(self) -> int:
        """Expert-parallel ranks inside one stage: with span, the tensor-parallel ones.

        Megatron's expert-parallel size; its expert-data-parallel groups are then those
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
        return self.world // (self.expert_tensor * self.expert * self.expert_stages)

    @property
    def tag(self) -> str:
        """Short name such as ``TP2.PP4.EP2``; ``single`` for one rank.

        DP counts the copies of the larger of the two grids, so that the tag together
        with nothing else gives the world size.
        """
        if self.world == 1:
            return "single"
        parts = (
            ("DP", self.world // self.grid),
            ("TP", self.tensor),
            ("CP", self.context),
            ("PP", self.pipeline),
            ("VPP", self.virtual_pipeline),
            ("EP", self.expert),
            ("ETP", self.expert_tensor),
        )
        text = ".".join(f"{name}{size}" for name, size in parts if size > 1)
        return text + (".span" if self.span else "")

    @classmethod
    def from_tag(cls, tag: str) -> Layout | None:
        """The layout that `tag` names, without layers and experts; None if it names none."""
        text = tag.removesuffix(".span")
        parts = [
            re.fullmatch(r"(DP|TP|CP|PP|VPP|EP|ETP)([1-9]\d{0,5})", p) for p in text.split(".")
        ]
        sizes = {part[1]: int(part[2]) for part in parts if part}
        if len(sizes) < len(parts):
            return None
        one = cls(
            world=0,
            tensor=sizes.get("TP", 1),
            pipeline=sizes.get("PP", 1),
            virtual_pipeline=sizes.get("VPP", 1),
            context=sizes.get("CP", 1),
            expert=sizes.get("EP", 1),
            expert_tensor=sizes.get("ETP", 1),
            placement="stage" if text == tag else "span",
        )
        return replace(one, world=one.grid * sizes.get("DP", 1))

    @property
    def grid(self) -> int:
        """Ranks of one copy of the larger of the two grids."""
        dense = self.tensor * self.context * self.pipeline // self.expert_stages
        return max(dense, self.expert_tensor * self.expert) * self.expert_stages

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
            *(
                [f"parallel.stages='{text_of(self.stages, self.mtp_layers)}'"]
                if self.stages
                else []
            ),
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

    def members(self, kind: str, rank: int) -> list[int]:
        """Ranks of `rank`'s process group of one kind, ascending.

        Under ``placement=span`` an expert-parallel group is a replica's tensor ranks in all
        stages, and expert replicas are the dense ones.
        """
        if kind == "embd":
            ranks = self.members("pp", rank)
            return [ranks[0], ranks[-1]] if len(ranks) > 1 else ranks
        parts = self.steps(kind)
        first = rank - sum(rank // stride % size * stride for stride, size in parts)
        offsets = (range(0, stride * size, stride) for stride, size in reversed(parts))
        return [first + sum(steps) for steps in product(*offsets)]

    def steps(self, kind: str) -> tuple[tuple[int, int], ...]:
        """(distance between neighbours, size) along each axis of a group's ranks, fastest first."""
        parts = self._steps.get(kind)
        if parts is None:
            axes = GROUPS[kind].axes
            if self.span:
                dense = {"etp": (), "ep": ("tp", "pp"), "edp": ("cp", "dp")}
                axes = tuple(other for axis in axes for other in dense.get(axis, (axis,)))
            parts = tuple(self._strides[axis] for axis in dict.fromkeys(axes))
            self._steps[kind] = parts
        return parts

    @cached_property
    def _steps(self) -> dict[str, tuple[tuple[int, int], ...]]:
        return {}

    @cached_property
    def _strides(self) -> dict[str, tuple[int, int]]:
        """(distance between neighbours, size) of every axis of both grids."""
        tensor, expert = self.tensor * self.context, self.expert_tensor * self.expert
        return {
            "tp": (1, self.tensor),
            "cp": (self.tensor, self.context),
            "dp": (tensor, self.data),
            "pp": (self.ranks_per_stage, self.pipeline),
            "etp": (1, self.expert_tensor),
            "ep": (self.expert_tensor, self.expert),
            "edp": (expert, self.expert_data),
        }

    def groups(self, kind: str) -> list[list[int]]:
        """All process groups of one kind of `GROUPS`, each ascending, in Megatron's order."""
        return list(self._groups(kind))

    def _groups(self, kind: str) -> Iterator[list[int]]:
        seen: set[int] = set()
        for rank in range(self.world):
            if rank not in seen:
                ranks = self.members(kind, rank)
                seen.update(self.members("pp", rank) if kind == "embd" else ranks)
                yield ranks

    def stage_layers(self, stage: int, chunk: int | None = None) -> list[int]:
        """1-based layers of pipeline stage `stage`, of one model chunk or of all.

        For plans; the model is cut by `moe_train.model.build` and Megatron. Interleaving deals
        chunks round-robin (Megatron's ``get_transformer_layer_offset``): chunk c of stage s starts
        after c * layers / chunks + s * layers / (chunks * stages) layers.
        """
        slots = self.pipeline * self.virtual_pipeline
        dealt = self.stages or (self.layers // slots,) * slots
        chunks = range(self.virtual_pipeline) if chunk is None else (chunk,)
        layers: list[int] = []
        for index in chunks:
            slot = index * self.pipeline + stage
            first = sum(dealt[:slot])
            layers.extend(range(first + 1, first + dealt[slot] + 1))
            if slot == slots - 1:
                layers.extend(range(self.layers + 1, self.layers + self.mtp_layers + 1))
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

"""The space of a search: every legal layout of a number of ranks, and the options that go with it.

A dimension that the caller fixes has one value, that of the config. What is legal is asked of the
rules (`moe_train.parallel.rules`), never decided here: a value of one dimension that its own rule
refuses with all other sizes at 1 is dropped first, which keeps the product of dimensions small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

from moe_train.config.kernels import KernelSet, expected_kernels_on
from moe_train.config.parallel import RecomputeConfig
from moe_train.config.root import Config
from moe_train.config.types import Placement
from moe_train.config.validate import validate
from moe_train.features.dispatchers import DISPATCHERS
from moe_train.parallel.kernel_rules import fp8_faults, kernel_options, kernel_sizes
from moe_train.parallel.layout import Layout, divisors
from moe_train.parallel.rules import layout_faults
from moe_train.parallel.sizes import layout_of, with_layout

SIZES = (
    "tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "placement",
)  # fmt: skip
"""Dimensions of a layout, by their names below ``parallel``."""
TOKENS = 32768
"""Tokens to which a micro-batch grows at most; eight sequences are tried in any case. Larger ones
only fill memory: the products of the experts have thousands of rows by then."""

MANY, POSITIONS = 512, 512
"""Beyond so many ranks, the least positions of a sequence that context parallelism leaves a rank:
finer parts have more ring steps with less in each, and many ranks have other ways to be used."""

POLICIES = (
    RecomputeConfig("none", []),
    RecomputeConfig("none", ["moe_act"]),
    RecomputeConfig("none", ["moe_act", "layernorm"]),
    RecomputeConfig("all", []),
)
"""Recomputation that a search tries, from the fastest to the smallest, and that of the config.

No single layers among them: the config's choice, if it names some, is the only such one."""


@dataclass(frozen=True)
class Options:
    """What a candidate chooses beside its layout."""

    micro: int
    recompute: RecomputeConfig
    overlap: bool
    """``parallel.overlap_expert_comm``."""
    dispatcher: str
    distributed: bool
    """``optim.distributed``."""
    reduce: bool
    """``parallel.overlap_grad_reduce``."""
    gather: bool
    """``parallel.overlap_param_gather``."""

    def applied(self, config: Config) -> Config:
        """`config` with these options."""
        return replace(
            config,
            batch=replace(config.batch, micro=self.micro),
            recompute=self.recompute,
            optim=replace(config.optim, distributed=self.distributed),
            parallel=replace(
                config.parallel,
                overlap_expert_comm=self.overlap,
                dispatcher=self.dispatcher,
                overlap_grad_reduce=self.reduce,
                overlap_param_gather=self.gather,
            ),
        )


class Choices(NamedTuple):
    """Values of the options but the micro-batch; those first that fewest rules refuse."""

    recompute: list[RecomputeConfig]
    overlap: list[bool]
    dispatcher: list[str]
    distributed: list[bool]
    reduce: list[bool]
    gather: list[bool]


@dataclass(frozen=True)
class Space:
    """Layouts and options that a search considers for `config` on `world` ranks.

    Args:
        config: with ``batch.global`` set, every candidate makes the same steps; without it, each
            replica makes the micro-batches that are configured, of the configured size.
        fixed: config keys whose values stay, such as ``parallel.tensor`` or ``batch.micro``.
    """

    config: Config
    world: int
    fixed: Collection[str] = ()

    @cached_property
    def kernels(self) -> KernelSet:
        """The kernels that run on the hardware profile."""
        return expected_kernels_on(self.config.backend.kernels, self.config.hardware).kernels

    @property
    def on_cpu(self) -> bool:
        """Whether the hardware profile is a CPU's."""
        return self.config.hardware.kind == "cpu"

    def legal(self, config: Config, layout: Layout) -> bool:
        """Whether no rule of values, layout and machine refuses `config` in `layout`."""
        return not any(
            True
            for faults in (
                validate(config),
                layout_faults(config, layout),
                kernel_options(config, self.kernels, self.on_cpu),
                kernel_sizes(config, layout, self.kernels, self.on_cpu),
                fp8_faults(config, layout),
            )
            for _ in faults
        )

    def layouts(self) -> Iterator[Layout]:
        """Every layout that is legal with some options, least tensor and expert sharding first."""
        base = layout_of(self.config, self.world)
        placements: list[Placement] = ["stage", "span"]
        if "parallel.placement" in self.fixed:
            placements = [base.placement]
        easy = self.easiest.applied(self.config)
        for placement in placements:
            one = replace(base, placement=placement)
            inside = self.config.hardware.devices_per_node
            parts = max(self.config.data.sequence // POSITIONS, 1) if self.world > MANY else None
            for tensor, pipeline, context in product(
                self._sizes(one, "tensor", inside),
                self._sizes(one, "pipeline"),
                self._sizes(one, "context", parts),
            ):
                if self.world % (tensor * pipeline * context):
                    continue
                if placement == "span" and pipeline == 1 and len(placements) > 1:
                    # Experts that span one stage are inside it.
                    continue
                dense = replace(one, tensor=tensor, pipeline=pipeline, context=context)
                for layout in self._expert_layouts(dense, inside):
                    if self.legal(with_layout(easy, layout), layout):
                        yield layout

    def _expert_layouts(self, dense: Layout, inside: int) -> Iterator[Layout]:
        span, ranks = dense.span, dense.ranks_per_stage
        experts = [dense.tensor * dense.pipeline] if span else self._sizes(dense, "expert")
        if "parallel.expert" in self.fixed:
            experts = [dense.expert]
        tensors = self._sizes(dense, "expert_tensor", inside)
        chunks = divisors(dense.layers // dense.pipeline) if dense.pipeline > 1 else [1]
        if "parallel.virtual_pipeline" in self.fixed:
            chunks = [dense.virtual_pipeline]
        for expert_tensor, expert, chunk in product(tensors, experts, chunks):
            if span or ranks % (expert * expert_tensor) == 0:
                yield replace(
                    dense, expert=expert, expert_tensor=expert_tensor, virtual_pipeline=chunk
                )

    def _sizes(self, base: Layout, name: str, limit: int | None = None) -> list[int]:
        """Values of one dimension that its own rules allow where every other size is 1."""
        if f"parallel.{name}" in self.fixed:
            return [getattr(base, name)]
        alone = Layout(
            base.world, layers=base.layers, experts=base.experts, placement=base.placement
        )
        sizes, easy = [], self.easiest.applied(self.config)
        for size in divisors(self.world):
            if limit and size > limit:
                break
            layout = replace(alone, **{name: size})  # type: ignore[arg-type]
            faults = [
                *layout_faults(easy, layout),
                *kernel_sizes(easy, layout, self.kernels, self.on_cpu),
            ]
            if not any(fault.field == f"parallel.{name}" for fault in faults):
                sizes.append(size)
        return sizes

    @cached_property
    def easiest(self) -> Options:
        """The options that fewest rules refuse, of those that are not fixed."""
        batch = self.config.batch
        micro = batch.micro if "batch.micro" in self.fixed or batch.global_ is None else 1
        recompute, overlap, dispatcher, distributed, reduce, gather = self.choices
        return Options(
            micro, recompute[0], overlap[0], dispatcher[0], distributed[0], reduce[0], gather[-1]
        )

    def micros(self, layout: Layout) -> list[int]:
        """Sizes of a micro-batch that divide a replica's sequences."""
        sequences, most = self.config.batch.global_, max(8, TOKENS // self.config.data.sequence)
        if "batch.micro" in self.fixed or sequences is None:
            return [self.config.batch.micro]
        return [micro for micro in divisors(max(sequences // layout.data, 1)) if micro <= most]

    def options(self, layout: Layout, micro: int) -> Iterator[Options]:
        """All options that are legal in `layout` with micro-batches of `micro` sequences."""
        config = with_layout(self.config, layout)
        for values in product(*self.choices):
            chosen = Options(micro, *values)
            if self.legal(chosen.applied(config), layout):
                yield chosen

    @cached_property
    def choices(self) -> Choices:
        """Values of every option but the micro-batch, legal together or not."""
        config = self.config
        parallel, optim = config.parallel, config.optim
        policies = [*POLICIES]
        if config.recompute not in policies:
            policies.append(config.recompute)
        sharded = [True] if optim.precision_aware else [True, False]
        key = "parallel.overlap_"
        return Choices(
            self._open("recompute", config.recompute, policies),
            self._open(key + "expert_comm", parallel.overlap_expert_comm, [False, True]),
            self._open("parallel.dispatcher", parallel.dispatcher, [*DISPATCHERS]),
            self._open("optim.distributed", optim.distributed, sharded),
            self._open(key + "grad_reduce", parallel.overlap_grad_reduce, [True, False]),
            self._open(key + "param_gather", parallel.overlap_param_gather, [True, False]),
        )

    @property
    def least_memory(self) -> RecomputeConfig:
        """The recomputation that keeps least, of those that are not fixed."""
        return self._open("recompute", self.config.recompute, [RecomputeConfig("all", [])])[0]

    def _open[T](self, key: str, value: T, values: list[T]) -> list[T]:
        inside = any(one == key or one.startswith(f"{key}.") for one in self.fixed)
        return [value] if inside else values

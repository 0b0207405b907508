"""Seconds below which no option brings a step: what a search prunes with.

Priced are layers with their collectives and launches, both ends of the model, messages, the bubble
and the update. Left out is what only adds to that: recomputation and collectives of the router.
Where an exchange overlaps, it is hidden as in a step that is all steady state; reductions and
gathers are hidden behind a whole micro-batch.

A layer is priced once for all numbers of stages: of its groups, none but the router's and those of
``placement=span`` reach beyond a stage or change their place with the number of stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import owned_parameters
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.cost.calls import expert_calls, sum_of, tensor_calls
from moe_train.planner.cost.communication import LEAST_EXPOSED, gradient_traffic
from moe_train.planner.cost.compute import dense_parts, expert_parts, optimizer_seconds
from moe_train.planner.cost.launches import host_seconds
from moe_train.planner.cost.links import point_to_point
from moe_train.planner.cost.passes import (
    Passes,
    end_times,
    feed_forward_time,
    overlapped,
    passes_of,
    ring_time,
)
from moe_train.planner.cost.pipeline import exposed_messages
from moe_train.planner.plan import Plan
from moe_train.planner.search.space import Space

Exchange = tuple[bool, str]
"""Values of ``parallel.overlap_expert_comm`` and ``parallel.dispatcher``."""


@dataclass(frozen=True)
class _Layer:
    """Least seconds for one micro-batch, forward and backward, on one rank."""

    own: dict[Exchange, float]
    """A layer with experts, by exchange; under span without them."""
    served: float
    """Under span: experts of all stages, all of them active."""
    dense: float
    """A layer without experts; infinite where the model has none."""
    ends: tuple[float, ...]
    """Embedding and head."""
    message: int
    """Bytes from one stage to the next."""


class Bounds:
    """Bounds of the plans in `space`, for a vocabulary of `vocab` tokens."""

    def __init__(self, space: Space, vocab: int, assumptions: Assumptions) -> None:
        self.space, self.vocab, self.assumptions = space, vocab, assumptions
        self._layers: dict[tuple[object, ...], _Layer] = {}
        self._updated: tuple[Layout | None, list[tuple[float, float]]] = None, []

    def least(self, layout: Layout, micro: int) -> float:
        """Seconds below which no option brings a step's passes."""
        layer = self._layer(layout, micro)
        return self._passes(layout, micro, layer, min(layer.own.values()))[0]

    def with_update(self, layout: Layout, micro: int) -> float:
        """The same of the whole step; takes longer to compute."""
        layer = self._layer(layout, micro)
        own = min(layer.own.values())
        return min(self._step(layout, micro, layer, own, one) for one in self._updates(layout))

    def of(self, layout: Layout, micro: int, exchange: Exchange, *, distributed: bool) -> float:
        """The same with this exchange and sharding of the optimizer."""
        layer, which = self._layer(layout, micro), self.space.choices.distributed
        update = self._updates(layout)[which.index(distributed)]
        return self._step(layout, micro, layer, layer.own[exchange], update)

    def _step(
        self, layout: Layout, micro: int, layer: _Layer, own: float, update: tuple[float, float]
    ) -> float:
        passes, slowest, count = self._passes(layout, micro, layer, own)
        sent, optimizer = update
        # All but LEAST_EXPOSED is hidden, at most behind a micro-batch's passes through one stage.
        return max(passes + LEAST_EXPOSED * sent, (count - 1) * slowest + sent) + optimizer

    def _updates(self, layout: Layout) -> list[tuple[float, float]]:
        """Traffic and optimizer in seconds, for each choice of sharding the optimizer."""
        if self._updated[0] != layout:
            results = []
            for distributed in self.space.choices.distributed:
                optim = replace(self.space.config.optim, distributed=distributed)
                config = replace(self.space.config, optim=optim)
                plan = Plan(config, layout, self.vocab, assumptions=self.assumptions)
                ends = [plan.parameters(stage) for stage in {0, layout.pipeline - 1}]
                traffic = [gradient_traffic(config, layout, held) for held in ends]
                results.append((
                    max(sum(sent.seconds for *_, sent in each) for each in traffic),
                    max(optimizer_seconds(config, held.total, owned_parameters(
                        config, layout, held)) for held in ends),
                ))  # fmt: skip
            self._updated = layout, results
        return self._updated[1]

    def _passes(
        self, layout: Layout, micro: int, layer: _Layer, own: float
    ) -> tuple[float, float, int]:
        """Seconds of all passes, those of a micro-batch in the slowest stage, and micro-batches."""
        config, stages, chunks = self.space.config, layout.pipeline, layout.virtual_pipeline
        count = replace(config.batch, micro=micro).per_step(layout.data)
        message = 0.0
        if stages > 1:
            sent = point_to_point(layout, config.hardware, 0, layer.message).seconds
            message = 2 * chunks * sent * exposed_messages(config.hardware, chunks)
        if layout.span:
            ticks, local = count + stages - 1, layout.layers / stages
            passes = local * (ticks * own + count * layer.served)
            # A stage's passes include what waits for other stages: nothing is sure to be hidden.
            return passes + count * max(layer.ends) + ticks * message, 0.0, count
        dense, every = config.model.dense_layers, layout.layers + layout.mtp_layers
        total = (every - dense) * own + sum(layer.ends) + stages * message
        total += dense * layer.dense if dense else 0.0
        slowest = total / stages
        if not layout.stages:
            local = layout.layers // stages
            slowest = max(slowest, local * min(own, layer.dense) + max(layer.ends) + message)
        # As `pipeline_time`; it grows with the slowest stage and with the sum of all.
        return count * slowest + (total - slowest) / chunks, slowest, count

    def _layer(self, layout: Layout, micro: int) -> _Layer:
        kind = (layout.tensor, layout.context, layout.expert, layout.expert_tensor, micro,
                layout.pipeline if layout.span else 0)  # fmt: skip
        if kind not in self._layers:
            if not layout.span:
                layout = replace(layout, pipeline=1, virtual_pipeline=1, stages=())
            self._layers[kind] = self._priced(layout, micro)
        return self._layers[kind]

    def _priced(self, layout: Layout, micro: int) -> _Layer:
        config = replace(self.space.easiest, micro=micro).applied(self.space.config)
        plan = Plan(config, layout, self.vocab, assumptions=self.assumptions)
        z, choices = plan.shapes, self.space.choices
        calls = [one for one in tensor_calls(config, layout, z) if one.part != "router"]
        dense = passes_of(dense_parts(config, z))
        around = [
            sum_of(calls, way).seconds + ring
            for way, ring in zip(("forward", "backward"), ring_time(plan), strict=True)
        ]
        stages = layout.pipeline if layout.span else 1
        experts = passes_of(expert_parts(config, z, layers=stages))
        own = {}
        for name in choices.dispatcher:
            chosen = replace(config, parallel=replace(config.parallel, dispatcher=name))
            sent = expert_calls(chosen, layout, z)
            exchange = Passes(*(sum_of(sent, way).seconds for way in ("forward", "backward")))
            host = host_seconds(chosen, z, 1, layout.layers)
            for overlap in choices.overlap:
                if layout.span:
                    left = 0.0 if overlap else sum(exchange)
                    own[overlap, name] = sum(dense) + sum(around) + left
                    continue
                after = exchange
                if overlap:
                    after = overlapped(config.hardware, exchange, dense, experts, steady=1.0)
                parts = zip(dense, experts, around, after, host, strict=True)
                own[overlap, name] = sum(max(sum(busy), least) for *busy, least in parts)
        feed = feed_forward_time(plan) if config.model.dense_layers else None
        return _Layer(
            own,
            sum(experts) if layout.span else 0.0,
            feed.forward() + feed.backward(recomputed=False) if feed else float("inf"),
            tuple(sum(both) for both in end_times(plan).values()),
            z.N * z.H * z.b,
        )

"""Every rank issues the same collectives in the same order, for any layout; nothing deadlocks.

The runtime's own schedule and exchange run on ranks that are threads, over a simulated
communicator that refuses two orders and tells of deadlocks. The model around them is a toy whose
loss and gradients are known without any communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wire import Deadlock, Mismatch, Wire, run_ranks

HIDDEN, ROWS = 4, 3


@dataclass(frozen=True)
class Case:
    """A layout, and how uneven its routing is."""

    stages: int
    tensor: int
    data: int
    local_layers: int
    microbatches: int
    per_rank: int = 1
    quiet: float = 0.3
    """Share of (micro-batch, layer) pairs in which a rank routes no token at all."""
    recompute: bool = False
    overlap: bool = False
    forward_only: bool = False
    seed: int = 0

    @property
    def block(self) -> int:
        """Ranks of a stage, all replicas: the pipeline is the slowest dimension."""
        return self.tensor * self.data

    @property
    def world(self) -> int:
        return self.stages * self.block

    @property
    def experts(self) -> int:
        return self.stages * self.tensor * self.per_rank

    def counts(self, column: int, batch: int, layer: int) -> np.ndarray[Any, Any]:
        """Rows that a pipeline (one tensor rank of a replica) sends to each expert of a layer."""
        rng = np.random.default_rng([self.seed, column, batch, layer])
        rows = 0 if rng.random() < self.quiet else int(rng.integers(0, ROWS + 1))
        return np.bincount(rng.integers(0, self.experts, rows), minlength=self.experts)

    def inputs(self, column: int, batch: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, 99, column, batch])
        return torch.from_numpy(rng.normal(size=(ROWS, 1, HIDDEN)).astype(np.float32))

    def weights(self, what: int) -> torch.Tensor:
        """By global layer (and expert): dense factors, or those of the experts."""
        shape = (self.stages * self.local_layers, self.experts) if what else (
            self.stages * self.local_layers,
        )  # fmt: skip
        values = np.random.default_rng([self.seed, 7, what]).normal(size=shape)
        return torch.from_numpy((1 + 0.1 * values).astype(np.float32))


def layer_output(
    hidden: torch.Tensor, dense: torch.Tensor, rows: int, exchanged: torch.Tensor
) -> torch.Tensor:
    """The toy's layer: everything scaled, routed rows with their experts' results on top."""
    pad = hidden.new_zeros(ROWS - rows, HIDDEN)
    return hidden * dense + torch.cat([exchanged, pad]).view(ROWS, 1, HIDDEN)


def routed(hidden: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = hidden.view(ROWS, HIDDEN)[:rows]
    return tokens, torch.sigmoid(tokens.sum(dim=1))


class Experts:
    """A local layer's experts on one rank, one set for each stage that they serve."""

    def __init__(self, case: Case, index: int, local: int) -> None:
        first = index * case.per_rank
        mine = case.weights(1)[:, first : first + case.per_rank]
        self.factors = [
            mine[stage * case.local_layers + local].clone().requires_grad_()
            for stage in range(case.stages)
        ]

    def __getitem__(self, stage: int) -> Any:
        def run(tokens: torch.Tensor, counts: Any, probs: torch.Tensor) -> tuple[Any, None]:
            counts = torch.as_tensor(counts)
            factors = self.factors[stage].repeat_interleave(counts)
            return tokens * (probs * factors)[:, None], None

        return run


class Stage(torch.nn.Module):
    """A pipeline stage of the toy, around the runtime's exchange."""

    def __init__(self, case: Case, span: Any, stage: int, column: int, config: Any) -> None:
        super().__init__()
        self.case, self.span, self.stage, self.column = case, span, stage, column
        self.config = config
        low = stage * case.local_layers
        self.dense = torch.nn.Parameter(case.weights(0)[low : low + case.local_layers].clone())
        self._input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self._input,) = tensors

    def forward(self, batch: int) -> torch.Tensor:
        from moe_train.model.span.dispatcher import DispatchAndCombine

        hidden = self.case.inputs(self.column, batch) if self.stage == 0 else self._input
        assert hidden is not None
        for local in range(self.case.local_layers):
            layer = self.stage * self.case.local_layers + local
            counts = torch.from_numpy(self.case.counts(self.column, batch, layer))
            tokens, probs = routed(hidden, int(counts.sum()))
            # Rows that need no gradient by themselves still take part in the exchange.
            if torch.is_grad_enabled() and not tokens.requires_grad:
                tokens.requires_grad_()
            sent = self.span.counts(local, counts)
            result = DispatchAndCombine.apply(self.span, local, sent, tokens, probs, None)
            hidden = layer_output(hidden, self.dense[local], len(tokens), result)
        return hidden


class Watched:
    """Writes down the ticks and layers in which a rank enters the exchange."""

    def __init__(self, span: Any, log: list[tuple[Any, ...]]) -> None:
        begin, counts, backward = span.begin, span.counts, span.backward

        def seen_begin(tick: int, active: Any, *, backward: bool, save: bool) -> None:
            log.append(("slot", tick, backward, tuple(sorted(active))))
            begin(tick, active, backward=backward, save=save)

        def seen_counts(layer: int, *args: Any) -> Any:
            log.append(("forward", layer))
            return counts(layer, *args)

        def seen_backward(layer: int, *args: Any) -> Any:
            log.append(("backward", layer))
            return backward(layer, *args)

        span.begin, span.counts, span.backward = seen_begin, seen_counts, seen_backward


@contextlib.contextmanager
def simulated(wire: Wire) -> Iterator[None]:
    """The runtime's schedule and exchange talk over `wire`."""
    from moe_train.model.span import dispatcher
    from moe_train.model.span import schedule as span_schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "dist", wire)
        patch.setattr(span_schedule, "dist", wire)
        yield


def rank_program(case: Case, wire: Wire, rank: int, microbatches: int) -> dict[str, Any]:
    """One rank's step through the runtime's own SpanSchedule."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe_train.model.span.dispatcher import CrossStageDispatcher
    from moe_train.model.span.experts import StageExperts
    from moe_train.model.span.schedule import SpanSchedule

    stage, inside = divmod(rank, case.block)
    replica, tensor = divmod(inside, case.tensor)
    replicas = [
        s * case.block + replica * case.tensor + t
        for s in range(case.stages)
        for t in range(case.tensor)
    ]
    pipeline = [s * case.block + inside for s in range(case.stages)]
    span_group = wire.group(f"replica {replica}", replicas, rank)
    groups = SimpleNamespace(
        pp=wire.group(f"pipeline {inside}", pipeline, rank),
        tp=SimpleNamespace(size=lambda: 1),
        cp=SimpleNamespace(size=lambda: 1),
    )
    span = CrossStageDispatcher(
        span_group, tensor=case.tensor, stages=case.stages, hidden=HIDDEN, dtype=torch.float32,
        device=torch.device("cpu"), recompute=case.recompute, overlap=case.overlap,
    )  # fmt: skip
    experts = [Experts(case, span_group.rank(), local) for local in range(case.local_layers)]
    for local, hosted in enumerate(experts):
        staged = StageExperts(hosted, case.per_rank, HIDDEN, recompute=case.recompute)
        span.register(local, staged)
    log: list[tuple[Any, ...]] = []
    Watched(span, log)
    config = TransformerConfig(
        num_layers=case.stages * case.local_layers, hidden_size=HIDDEN, num_attention_heads=1,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    config.finalize_model_grads_func = lambda *args, **kwargs: None
    chunk = Stage(case, span, stage, inside, config)

    def forward_step(batches: Iterator[int], model: Any) -> tuple[torch.Tensor, Any]:
        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = output.square().mean()
            return value, value.detach().clone()

        return model(next(batches)), loss

    schedule = SpanSchedule(span, groups, lambda *_, **__: contextlib.nullcontext())
    with torch.set_grad_enabled(not case.forward_only):
        losses = schedule(
            forward_step_func=forward_step, data_iterator=iter(range(microbatches)),
            model=[chunk], num_microbatches=microbatches, seq_length=ROWS, micro_batch_size=1,
            forward_only=case.forward_only,
        )  # fmt: skip
    return {
        "losses": [float(value) for value in losses],
        "dense": chunk.dense.grad,
        "experts": [[factor.grad for factor in layer.factors] for layer in experts],
        "log": log,
        "slots": (schedule.counts.forward_slots, schedule.counts.backward_slots),
    }


def expected(case: Case) -> tuple[list[list[float]], torch.Tensor, torch.Tensor]:
    """Losses by pipeline, and gradients of all weights summed over pipelines."""
    dense, factors = case.weights(0).requires_grad_(), case.weights(1).requires_grad_()
    losses: list[list[float]] = []
    for column in range(case.block):
        losses.append([])
        for batch in range(case.microbatches):
            hidden = case.inputs(column, batch)
            for layer in range(case.stages * case.local_layers):
                counts = torch.from_numpy(case.counts(column, batch, layer))
                tokens, probs = routed(hidden, int(counts.sum()))
                by_row = factors[layer].repeat_interleave(counts)
                result = tokens * (probs * by_row)[:, None]
                hidden = layer_output(hidden, dense[layer], len(tokens), result)
            value = hidden.square().mean()
            (value / case.microbatches).backward()
            losses[-1].append(float(value.detach()))
    assert dense.grad is not None and factors.grad is not None
    return losses, dense.grad, factors.grad


def check(case: Case) -> None:
    wire = Wire()
    with simulated(wire):
        result = run_ranks(
            case.world, lambda rank: rank_program(case, wire, rank, case.microbatches), wire
        )
    for replica in range(case.data):
        ranks = [rank for rank in range(case.world) if rank % case.block // case.tensor == replica]
        ours = [wire.log[rank] for rank in ranks]
        assert all(log == ours[0] for log in ours)
        walks = [result[rank]["log"] for rank in ranks]
        assert all(walk == walks[0] for walk in walks)
        slots = case.microbatches + case.stages - 1
        back = 0 if case.forward_only else slots
        assert len(ours[0]) == (3 * slots + 2 * back) * case.local_layers
        assert all(result[rank]["slots"] == (slots, back) for rank in ranks)
    losses, dense, factors = expected(case)
    last = (case.stages - 1) * case.block
    for column in range(case.block):
        assert result[last + column]["losses"] == pytest.approx(losses[column], rel=1e-5)
    if case.forward_only:
        return
    for stage in range(case.stages):
        ranks = range(stage * case.block, (stage + 1) * case.block)
        summed = sum(result[rank]["dense"] for rank in ranks)
        low = stage * case.local_layers
        torch.testing.assert_close(
            summed, dense[low : low + case.local_layers], rtol=1e-4, atol=1e-5
        )
    for rank in range(case.world):
        stage, inside = divmod(rank, case.block)
        if inside >= case.tensor:
            continue
        copies = [rank + replica * case.tensor for replica in range(case.data)]
        first = (stage * case.tensor + inside) * case.per_rank
        for local in range(case.local_layers):
            for served in range(case.stages):
                total = sum(result[copy]["experts"][local][served] for copy in copies)
                whole = factors[served * case.local_layers + local]
                torch.testing.assert_close(
                    total, whole[first : first + case.per_rank], rtol=1e-4, atol=1e-5
                )


CASES = st.builds(
    Case,
    stages=st.integers(1, 4),
    tensor=st.integers(1, 2),
    data=st.integers(1, 2),
    local_layers=st.integers(1, 3),
    microbatches=st.integers(1, 6),
    per_rank=st.integers(1, 2),
    quiet=st.sampled_from([0.0, 0.3, 1.0]),
    recompute=st.booleans(),
    overlap=st.booleans(),
    forward_only=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=25)
@given(CASES)
def test_one_order_for_all_ranks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_missions_ranks(overlap: bool) -> None:
    """PP4, TP2, EP8, with fewer micro-batches than stages and with more."""
    for batches in (2, 8):
        check(Case(4, 2, 1, 4, batches, 8, recompute=True, overlap=overlap))


@pytest.mark.parametrize("wrong", [2, 4])
def test_a_rank_with_another_count_of_micro_batches_is_caught(wrong: int) -> None:
    case, wire = Case(2, 1, 1, 1, 3), Wire(patience=1.0)
    with simulated(wire), pytest.raises((Mismatch, Deadlock, AssertionError)):
        run_ranks(2, lambda r: rank_program(case, wire, r, wrong if r else 3), wire)


def test_idle_ranks_that_walk_the_other_way_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanges of two layers look alike on the wire: the walks and the values tell."""
    from moe_train.model.span import schedule as span_schedule

    case = Case(3, 1, 1, 2, 2, quiet=0.0)
    check(case)
    monkeypatch.setattr(span_schedule, "reversed", lambda layers: layers, raising=False)
    with pytest.raises((AssertionError, RuntimeError)):
        check(case)


def test_another_order_is_refused_and_named() -> None:
    wire = Wire(patience=1.0)

    def work(rank: int) -> None:
        group = wire.group("both", [0, 1], rank)
        for columns in (1, 2) if rank else (2, 1):
            data = torch.zeros(2, columns)
            wire.all_to_all_single(data.clone(), data, group=group)

    with pytest.raises((Mismatch, Deadlock), match="rank 0|rank 1"):
        run_ranks(2, work, wire)


def test_a_message_without_its_other_side_is_a_deadlock() -> None:
    wire = Wire(patience=0.3)

    def work(rank: int) -> None:
        group = wire.group("both", [0, 1], rank)
        if rank == 0:
            (sent,) = wire.batch_isend_irecv([wire.P2POp(wire.isend, torch.zeros(1), 1, group)])
            sent.wait()

    with pytest.raises(Deadlock, match="isend with rank 1"):
        run_ranks(2, work, wire)


def test_rows_come_from_their_senders() -> None:
    wire = Wire()

    def work(rank: int) -> list[float]:
        group = wire.group("both", [0, 1], rank)
        data = torch.tensor([[10.0 * rank], [10.0 * rank + 1], [10.0 * rank + 2]])
        output = torch.empty(2 if rank == 0 else 4, 1)
        sent, wanted = [1, 2], [1, 1] if rank == 0 else [2, 2]
        wire.all_to_all_single(output, data, wanted, sent, group=group)
        values: list[float] = output.ravel().tolist()
        return values

    assert run_ranks(2, work, wire) == [[0.0, 10.0], [1.0, 2.0, 11.0, 12.0]]

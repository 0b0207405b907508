"""One step under span against the single process: loss, norm and every gradient tensor.

The loss hardly moves under a wrong gradient, so the gradients themselves are compared, and the
faults that the exchange could have are planted to see that this notices them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from moe_train.testing.world import run_world
from tests.support.engines import (
    Array,
    Shard,
    assemble,
    gradient_shards,
    micro_batches,
    open_engine,
)

pytestmark = pytest.mark.world

MODEL = [
    "experiment=twin",
    "parallel=single",
    "recompute=none",
    "model.layers=4",
    "model.hidden=64",
    "model.heads=8",
    "model.head_dim=8",
    "model.experts=8",
    "model.expert_hidden=32",
    "data.sequence=32",
    "optim.clip=0",
]
PP2_EP2 = ["parallel.placement=span", "parallel.pipeline=2", "parallel.expert=2"]
TP2_PP2_EP4 = [*PP2_EP2, "parallel.tensor=2", "parallel.expert=4"]


@dataclass
class Step:
    """What one rank saw of one step."""

    loss: float
    grad_norm: float
    gradients: list[Shard]
    counts: Any
    expert_rows: int
    """Token copies that this rank's experts computed."""


def one_step(
    rank: int, world: int, overrides: Sequence[str], sequences: int, fault: str = ""
) -> Step:
    """Build, take one step on fixed random tokens, and return gradients by global key."""
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, [*MODEL, f"batch.global={sequences}", *overrides])
    if fault:
        plant(engine, fault)
    tokens = np.random.default_rng(5).integers(0, 128, (sequences, 33))
    with rows_through_experts() as rows:
        result = train_step(engine, micro_batches(engine, tokens), 1)
    counts = getattr(engine.forward_backward, "counts", None)
    return Step(result.loss, result.grad_norm, gradient_shards(engine), counts, sum(rows))


@contextmanager
def rows_through_experts() -> Iterator[list[int]]:
    """Rows of every pass through hosted experts, as they are: FLOPs are proportional to them."""
    from moe_train.model.span.experts import MergedExperts

    run, rows = MergedExperts.forward, []

    def counted(self: Any, counts: Any, packed: Any, *, save: bool) -> Any:
        rows.append(packed.shape[0])
        return run(self, counts, packed, save=save)

    MergedExperts.forward = counted  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        MergedExperts.forward = run  # type: ignore[method-assign]


def plant(engine: Any, fault: str) -> None:
    """Break the exchange in one way."""
    import torch

    from moe_train.backend.torch_kernels import replay
    from moe_train.model.span import dispatcher, experts
    from moe_train.model.span import schedule as span_schedule

    if fault == "zeroed probability gradients":
        plain = experts.backward

        def without_probs(*args: Any, **kwargs: Any) -> Any:
            tokens, probs = plain(*args, **kwargs)
            return tokens, torch.zeros_like(probs)

        experts.backward = without_probs
    elif fault == "zeroed inputs of one stage":
        run = experts.MergedExperts.forward

        def zeroed(self: Any, counts: Any, packed: Any, *, save: bool) -> Any:
            rows = [int(each.sum()) for each in counts.values()]
            parts = list(packed.split(rows))
            parts = [p * (stage != 1) for p, stage in zip(parts, counts, strict=True)]
            return run(self, counts, torch.cat(parts), save=save)

        experts.MergedExperts.forward = zeroed
    elif fault == "rows of one stage given to the other's experts":
        rows_of = experts.MergedExperts._rows

        def exchanged(self: Any, counts: Any) -> Any:
            return rows_of(self, counts).reshape(2, -1)[::-1].ravel()

        experts.MergedExperts._rows = exchanged
    elif fault == "weight gradients of the other stage":
        product = replay._Product.backward

        def shifted(ctx: Any, grad: Any) -> Any:
            buffer = ctx.weight.main_grad
            ctx.weight.main_grad = torch.roll(buffer, len(buffer) // 2, 0)
            result = product(ctx, grad)
            buffer.copy_(torch.roll(ctx.weight.main_grad, -(len(buffer) // 2), 0))
            ctx.weight.main_grad = buffer
            return result

        replay._Product.backward = staticmethod(shifted)
    elif fault == "neighbour's micro-batch in backward":
        held = dispatcher.CrossStageDispatcher.backward

        def swapped(self: Any, layer: int, grad: Any = None) -> Any:
            for queue in self._saved.values():
                # Padded routing: every micro-batch has the same rows for every expert.
                if len(queue) > 1:
                    queue[0], queue[1] = queue[1], queue[0]
            return held(self, layer, grad)

        dispatcher.CrossStageDispatcher.backward = swapped
    elif fault == "dropped aux loss":
        from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

        MoEAuxLossAutoScaler.apply = staticmethod(lambda output, loss: output)
    else:
        assert fault == "gradients of the wrong stage"
        start = span_schedule.Edge.start

        def halved(self: Any, slot: Any, outgoing: Any) -> None:
            if self._step < 0 and outgoing is not None:
                outgoing = outgoing * 0.5
            start(self, slot, outgoing)

        span_schedule.Edge.start = halved


@pytest.fixture(scope="module")
def reference() -> Any:
    """The single process's step, by overrides and number of sequences."""
    done: dict[tuple[str, ...], Step] = {}

    def get(sequences: int, *overrides: str) -> Step:
        key = (str(sequences), *overrides)
        if key not in done:
            done[key] = run_world(one_step, 1, list(overrides), sequences)[0]
        return done[key]

    return get


def difference(steps: Sequence[Step], single: Step) -> dict[str, float]:
    """Largest difference of each gradient tensor, relative to that tensor's largest value."""
    ours, theirs = assemble([s.gradients for s in steps]), assemble([single.gradients])
    assert ours.keys() == theirs.keys()

    def relative(a: Array, b: Array) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))

    return {key: relative(ours[key], theirs[key]) for key in ours}


def assert_equal(steps: Sequence[Step], single: Step, tolerance: float = 2e-5) -> None:
    """Every rank agrees with the single process."""
    for step in steps:
        assert step.loss == pytest.approx(single.loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(single.grad_norm, rel=tolerance)
    worst = difference(steps, single)
    assert max(worst.values()) < tolerance, sorted(worst.items(), key=lambda i: -i[1])[:5]


@pytest.mark.parametrize("sequences", [1, 2, 8])
def test_any_number_of_micro_batches(reference: Any, sequences: int) -> None:
    steps = run_world(one_step, 2, PP2_EP2, sequences)
    assert_equal(steps, reference(sequences))
    for stage, step in enumerate(steps):
        assert step.counts.forward_slots == step.counts.backward_slots == sequences + 1
        assert step.counts.most_in_flight == min(sequences, 2 * (1 - stage) + 1)


@pytest.mark.parametrize(
    "recompute",
    [[], ["recompute.layers=2-3"], ["recompute.layers=all"], ["recompute.modules=[moe]"],
     ["recompute.layers=all", "recompute.modules=[moe,moe_act]"]],
    ids=["none", "2-3", "all", "experts", "all and experts"],
)  # fmt: skip
def test_tensor_parallel_and_recompute(reference: Any, recompute: list[str]) -> None:
    assert_equal(run_world(one_step, 4, [*TP2_PP2_EP4, *recompute], 4), reference(4))


@pytest.mark.full
@pytest.mark.parametrize("sequences", [1, 2, 4, 8])
@pytest.mark.parametrize("recompute", [[], ["recompute.layers=2-7"]], ids=["none", "2-7"])
def test_the_missions_layout(reference: Any, sequences: int, recompute: list[str]) -> None:
    """TP2 x PP4 x EP8 on 8 ranks, with fewer, as many and more micro-batches than stages."""
    size = ["model.layers=8", "model.experts=16"]
    layout = ["parallel.placement=span", "parallel.tensor=2", "parallel.pipeline=4"]
    overrides = [*size, *layout, "parallel.expert=8", *recompute]
    steps = run_world(one_step, 8, overrides, sequences)
    assert_equal(steps, reference(sequences, *size))
    for rank, step in enumerate(steps):
        assert step.counts.forward_slots == step.counts.backward_slots == sequences + 3
        assert step.counts.most_in_flight == min(sequences, 2 * (3 - rank // 2) + 1)


PADDED = ["model.router.capacity_factor=1.0", "model.router.pad_to_capacity=true"]
ASSIGNED = 4 * 32 * 2 * 4
"""Sequences x tokens x experts per token x layers."""


def test_expert_work_is_level_up_to_routing(reference: Any) -> None:
    routed = [step.expert_rows for step in run_world(one_step, 4, TP2_PP2_EP4, 4)]
    assert sum(routed) == ASSIGNED and len(set(routed)) > 1
    level = [step.expert_rows for step in run_world(one_step, 4, [*TP2_PP2_EP4, *PADDED], 4)]
    assert len(set(level)) == 1 and level[0] > 0


OVERLAP = "parallel.overlap_expert_comm=true"


@pytest.mark.parametrize(
    "options",
    [[], ["recompute.layers=all", "recompute.modules=[moe]"], ["model.shared_expert_hidden=48"]],
    ids=["none", "recompute", "shared expert"],
)
def test_overlap_changes_no_bit(reference: Any, options: list[str]) -> None:
    plain = run_world(one_step, 4, [*TP2_PP2_EP4, *options], 4)
    overlapped = run_world(one_step, 4, [*TP2_PP2_EP4, *options, OVERLAP], 4)
    for stage, (one, other) in enumerate(zip(plain, overlapped, strict=True)):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
        for mine, yours in zip(one.gradients, other.gradients, strict=True):
            assert mine.key == yours.key and np.array_equal(mine.data, yours.data), mine.key
        assert other.counts.most_in_flight == min(4, 2 * (1 - stage // 2) + 2)
        assert other.counts.forward_slots == other.counts.backward_slots == 5
    assert_equal(overlapped, reference(4, *[word for word in options if word.startswith("model.")]))


def test_sixteen_bit_is_as_near_as_one_process_is() -> None:
    """bf16 under span is no further from the exact gradients than bf16 in one process."""
    exact = assemble([run_world(one_step, 1, [], 4)[0].gradients])
    errors = []
    for world, layout in ((1, []), (4, TP2_PP2_EP4)):
        steps = run_world(one_step, world, [*layout, "dtype=bf16"], 4)
        result = assemble([step.gradients for step in steps])
        errors.append({
            key: float(np.linalg.norm(result[key] - exact[key]) / np.linalg.norm(exact[key]))
            for key in exact
        })  # fmt: skip
    single, span = errors
    assert np.mean(list(single.values())) > 1e-3, "not computed in 16 bit"
    assert np.mean(list(span.values())) < 1.1 * np.mean(list(single.values()))
    worse = {key: (span[key], single[key]) for key in span if span[key] > 2 * single[key] + 0.01}
    assert not worse, worse


def test_two_replicas(reference: Any) -> None:
    assert_equal(run_world(one_step, 4, PP2_EP2, 4), reference(4))


def test_two_replicas_with_the_distributed_optimizer(reference: Any) -> None:
    steps = run_world(one_step, 4, [*PP2_EP2, "optim.distributed=true"], 4)
    for step in steps:
        assert step.grad_norm == pytest.approx(reference(4).grad_norm, rel=1e-6)


ROUTERS = {
    "sigmoid with bias": ["model.router.score=sigmoid", "model.router.expert_bias=true"],
    "sequence aux": ["model.router.balancing=seq_aux"],
    "global aux": ["model.router.balancing=global_aux"],
    "sinkhorn": ["model.router.balancing=sinkhorn", "model.experts_per_token=1"],
    "none and z-loss": ["model.router.balancing=none", "model.router.z_coeff=0.1"],
    "capacity": ["model.router.capacity_factor=1.0"],
    "capacity by position": [
        "model.router.capacity_factor=0.5",
        "model.router.drop_policy=position",
    ],
    "padded": ["model.router.capacity_factor=1.0", "model.router.pad_to_capacity=true"],
    "groups": ["model.router.groups=4", "model.router.groups_per_token=2"],
    "pre-softmax, scaled": ["model.router.pre_softmax=true", "model.router.scaling_factor=2.5"],
    "shared expert, GQA": ["model.shared_expert_hidden=48", "model.kv_heads=4"],
    "tied embeddings": ["model.tied_embeddings=true"],
}


@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
def test_router_and_model_options(reference: Any, options: list[str]) -> None:
    assert_equal(run_world(one_step, 2, [*PP2_EP2, *options], 3), reference(3, *options))


@pytest.mark.parametrize(
    "fault",
    [
        "zeroed probability gradients",
        "zeroed inputs of one stage",
        "rows of one stage given to the other's experts",
        "weight gradients of the other stage",
        "neighbour's micro-batch in backward",
        "dropped aux loss",
        "gradients of the wrong stage",
    ],
)
def test_planted_faults_are_noticed(reference: Any, fault: str) -> None:
    steps = run_world(one_step, 2, [*PP2_EP2, *PADDED], 4, fault)
    worst = max(difference(steps, reference(4, *PADDED)).values())
    assert worst > 1e-3, "the comparison does not notice it"
    with pytest.raises(AssertionError):
        assert_equal(steps, reference(4, *PADDED))

"""Memory in closed form: state to the byte, activations against a real step, what fits."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.cli import main
from moe_train.config.compose import compose
from moe_train.config.root import Config
from moe_train.features.schedules import Pipeline, schedule_of, span_rows_in_flight
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import bytes_per_parameter, state_bytes, variants
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.shapes import Assumptions, shapes
from moe_train.planner.memory.activations import total
from moe_train.planner.memory.fit import memory_fault
from moe_train.planner.memory.layers import INPUT_TWICE, whole_layer
from moe_train.planner.memory.stages import StageMemory, plan_memory, worst
from moe_train.planner.plan import Plan
from moe_train.planner.report.costs import optimizer_rows
from moe_train.planner.resolution import resolve_run
from moe_train.testing.world import run_world

REFERENCE = ["experiment=moe_30b_8x64gb"]
STAGE = [*REFERENCE, "parallel.placement=stage"]
READINGS = {
    "span": (REFERENCE, 8),
    "EP2": ([*STAGE, "parallel.expert=2"], 8),
    "ETP2": ([*STAGE, "parallel.expert=1", "parallel.expert_tensor=2"], 8),
    "EP8": ([*STAGE, "parallel=tp2_ep8"], 8),
    "32": (["experiment=moe_30b_32x64gb"], 32),
}
VOCAB = 50304


def of(config: Config, layout: Layout, imbalance: float = 1.0) -> Plan:
    return Plan(config, layout, VOCAB, assumptions=Assumptions(imbalance))


@pytest.mark.parametrize(
    ("name", "each"),
    [("plain Adam", 18), ("distributed", 18), ("precision-aware", 12), ("offloaded", 16)],
)
def test_bytes_of_a_parameter(name: str, each: int) -> None:
    run = resolve_run(REFERENCE, 8)
    config, layout = run.config, run.layout
    changed, _ = variants(config)[name]
    assert bytes_per_parameter("bf16", changed.optim).total == each
    held = rank_parameters(config.model, layout, 0, VOCAB)
    state = state_bytes(changed, layout, held)
    assert state.device + state.host == each * 3_816_493_056


def test_variants_are_what_their_overrides_compose() -> None:
    config = resolve_run(REFERENCE, 8).config
    for changed, overrides in variants(config).values():
        pasted = compose([*REFERENCE, *overrides.split()]).optim
        same = ("distributed", "precision_aware", "moment_dtype", "offload")
        assert {k: getattr(pasted, k) for k in same} == {k: getattr(changed.optim, k) for k in same}


def test_the_two_figures_of_the_document() -> None:
    """About 17 GB without optimizer state, about 45 GB of state with it; plain Adam is too much."""
    run = resolve_run(READINGS["EP2"][0], 8)
    config, layout = run.config, run.layout
    rows = {row["optimizer"]: row for row in optimizer_rows(of(config, layout))}
    need = worst(plan_memory(of(config, layout)))
    assert 16e9 < need.without_optimizer < 18.5e9
    assert round(rows["precision-aware"]["state_bytes"] / 1e9, 1) == 45.8
    assert round(rows["plain Adam"]["state_bytes"] / 1e9, 1) == 68.7
    assert (rows["precision-aware"]["fits"], rows["plain Adam"]["fits"]) == (True, False)
    without = rows["no optimizer state"]
    assert without["total_bytes"] == pytest.approx(
        rows["precision-aware"]["total_bytes"] - need.state.optimizer
    )


def test_distribution_divides_dense_and_expert_state_by_their_own_replicas() -> None:
    run = resolve_run(READINGS["EP8"][0], 8)
    config, layout = run.config, run.layout
    held = rank_parameters(config.model, layout, 0, VOCAB)
    state = state_bytes(config, layout, held)
    assert (layout.data, layout.expert_data) == (4, 1)
    assert state.optimizer == 8 * (held.dense // 4 + held.experts)


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("fused", [True, False])
def test_recomputation_orders_memory(name: str, fused: bool) -> None:
    overrides, world = READINGS[name]
    needs: list[list[StageMemory]] = []
    for layers in ("none", "2-15", "all"):
        run = resolve_run([*overrides, f"recompute.layers={layers}"], world)
        config, layout = run.config, run.layout
        needs.append(plan_memory(Plan(config, layout, VOCAB, assumptions=Assumptions(fused=fused))))
    for stages in zip(*needs, strict=True):
        none, middle, every = (one.activations for one in stages)
        assert none > middle
        # A layer recomputed while it is the last holds its output besides, and its dispatcher
        # the gradient of its input.
        assert middle >= every - 2 * 4096 * 4608
    assert worst(needs[0]).activations > 1.5 * worst(needs[2]).activations


@settings(deadline=None, max_examples=60)
@given(
    stages=st.sampled_from([1, 2, 4, 8]),
    chunks=st.sampled_from([1, 2]),
    microbatches=st.integers(1, 12),
)
def test_in_flight_never_exceeds_what_exists_and_falls_along_the_pipeline(
    stages: int, chunks: int, microbatches: int
) -> None:
    microbatches *= stages if chunks > 1 else 1
    sizes = Pipeline(stages, microbatches, chunks)
    held = [
        schedule_of("auto", chunks=chunks, span=False).in_flight(sizes, stage)
        for stage in range(stages)
    ]
    assert held == sorted(held, reverse=True)
    assert all(1 <= one <= microbatches * chunks for one in held)
    same = [
        schedule_of("auto", chunks=1, span=True).in_flight(sizes, stage) for stage in range(stages)
    ]
    assert sum(same) / stages == pytest.approx(span_rows_in_flight(sizes))
    if microbatches >= 2 * stages:
        assert span_rows_in_flight(sizes) == stages
        assert same[0] == 2 * (stages - 1) + 1


@settings(deadline=None, max_examples=25)
@given(imbalance=st.floats(1, 3), sequence=st.sampled_from([512, 2048, 8192]))
def test_imbalance_and_length_cost_memory(imbalance: float, sequence: int) -> None:
    config, layout = _reference()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence=sequence))
    even = plan_memory(of(config, layout))[0]
    skewed = plan_memory(of(config, layout, imbalance))[0]
    assert skewed.total >= even.total
    longer = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence=2 * sequence)
    )
    assert plan_memory(of(longer, layout))[0].activations > even.activations


_CACHE: list[tuple[Config, Layout]] = []


def _reference() -> tuple[Config, Layout]:
    if not _CACHE:
        run = resolve_run(REFERENCE, 8)
        _CACHE.append((run.config, run.layout))
    return _CACHE[0]


def test_capacity_bounds_what_imbalance_adds() -> None:
    run = resolve_run([*REFERENCE, "model.router.capacity_factor=1.25"], 8)
    config, layout = run.config, run.layout
    free, _ = _reference()
    wild = Assumptions(imbalance=4.0)
    unbounded = shapes(free, layout, VOCAB, wild).R
    assert pytest.approx(unbounded * 1.25 / 4) == shapes(config, layout, VOCAB, wild).R


@pytest.mark.parametrize(
    ("args", "code"), [([], 0), (["optim=adam"], 2), (["optim=adam", "hardware=h200_141gb"], 0)]
)
def test_a_plan_that_does_not_fit_is_refused(
    args: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *REFERENCE, *args]) == code
    output = capsys.readouterr().err
    assert ("optim=precision_aware" in output) == (code == 2)


def test_named_remedies_fit_when_pasted() -> None:
    run = resolve_run([*REFERENCE, "optim=adam"], 8)
    fault = memory_fault(Plan.of(run))
    assert fault is not None and fault.exit_code == 2
    for line in fault.fix.split("\n"):
        overrides = line.strip().removeprefix("or ").partition(" (")[0].split()
        run = resolve_run([*REFERENCE, "optim=adam", *overrides], 8)
        assert memory_fault(Plan.of(run)) is None, overrides


def test_a_cpu_is_only_warned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "hardware.memory_gb=0.001", "--world", "1"]) == 0
    assert "warning" in capsys.readouterr().out


SMALL = [
    "device=cpu", "experiment=single", "model.layers=4", "model.hidden=64", "model.heads=4",
    "model.head_dim=8", "model.experts=8", "model.expert_hidden=48", "model.vocab=128",
    "data.sequence=128", "batch.micro=1", "batch.microbatches=4",
]  # fmt: skip


@pytest.mark.world
@pytest.mark.parametrize(
    ("args", "world"),
    [
        (["dtype=fp32"], 1),
        (["dtype=bf16", "recompute.layers=2-3"], 1),
        (["dtype=fp32", "parallel.tensor=2", "parallel.expert=2"], 2),
        (["dtype=fp32", "parallel.pipeline=2", "recompute.layers=1-2"], 2),
        (["dtype=fp32", "parallel.pipeline=2", "parallel.expert=2", "parallel.placement=span"], 2),
        (["dtype=fp32", "parallel.tensor=2", "parallel.expert=1", "parallel.expert_tensor=2",
          "model.router.force_balance=true"], 2),
    ],
)  # fmt: skip
def test_saved_bytes_equal_a_real_steps(args: list[str], world: int) -> None:
    """What autograd really saves at its peak, distinct storages counted."""
    from tests.support.activations import peak_saved_bytes

    run = resolve_run([*SMALL, *args], world)
    config, layout = run.config, run.layout
    real = run_world(peak_saved_bytes, world, [*SMALL, *args])
    taken = Assumptions(fused=False)
    z = shapes(config, layout, 128, taken)
    names = {INPUT_TWICE, *(term.name for term in whole_layer(z))}
    for rank in range(world):
        stage = layout.coordinates(rank).dense.pp
        moments = plan_memory(Plan(config, layout, 128, assumptions=taken))[stage].moments
        planned = max(
            one.saved + total(term for term in one.buffers if term.name in names) for one in moments
        )
        # Routing is not even, so a rank's experts see more or fewer rows than the average.
        assert planned == pytest.approx(real[rank][0], rel=0.03), (rank, planned, real[rank][0])

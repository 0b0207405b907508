"""The dry run against real ranks and against the closed form; its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.measure.dryrun.prepare import enough_microbatches
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.memory.stages import stage_memory
from moe_train.planner.plan import Plan
from moe_train.planner.resolution import resolve_run
from moe_train.testing.layouts import (
    DP2,
    EP2,
    PP2_EP2_SPAN,
    SMALL,
    TP2_ETP2,
    TP2_PP2_EP2,
    TWIN,
    Layout,
)
from moe_train.testing.world import run_world
from tests.support.dryrun_page import READINGS, rows
from tests.support.tracked import VOCAB, real_rank

LONG = [*SMALL, "device=cpu", "data.sequence=256", "batch.global=6", "model.hidden=128"]
"""Activations large enough beside the weights that a mistake in them shows."""
ALLOWED = 0.05
"""Difference between closed form and dry run that the planner promises to stay below."""
SCALARS = 1024
"""Bytes of single numbers, which one rank makes and its peer does not."""
EVEN = "model.router.force_balance=true"
OPTIMIZERS = {
    "plain fp32": ["dtype=fp32"],
    "plain bf16": ["dtype=bf16"],
    "distributed": ["dtype=bf16", "optim.distributed=true"],
    "precision-aware": ["dtype=bf16", "optim=precision_aware"],
    "sgd": ["dtype=bf16", "optim.name=sgd"],
}


def fake_ranks(
    rank: int, one: int, words: list[str], world: int, ranks: Any = None, **options: Any
) -> list[Any]:
    """The same of ``ranks`` (default: all) on fake tensors."""
    from moe_train.measure.dryrun.prepare import cpu_backend

    run = resolve_run(words, world)
    run = run.with_vocabulary(VOCAB, "test")
    backend = cpu_backend(run.config)

    from moe_train.measure.dryrun.rank import dry_run

    runs = [dry_run(run, backend, each, **options) for each in ranks or range(world)]
    return [
        (one.weights, one.gradients, one.optimizer, one.peak.bytes, one.peak.phase) for one in runs
    ]


def hold_to_real(words: list[str], world: int) -> None:
    real = run_world(real_rank, world, words)
    [fake] = run_world(fake_ranks, 1, words, world)
    run = resolve_run(words, world)
    config, layout = run.config, run.layout
    for rank, (ours, theirs) in enumerate(zip(fake, real, strict=True)):
        assert ours[:3] == theirs[:3], f"state of rank {rank}"
        state = sum(ours[:3])
        # What comes and goes, which is the part that could go wrong.
        assert ours[3] - state == pytest.approx(theirs[3] - state, rel=0.05), rank
        taken = Assumptions(fused=False, fragmentation=0.0)
        stage = layout.coordinates(rank).dense.pp
        plan = stage_memory(Plan(config, layout, VOCAB, assumptions=taken), stage)
        assert plan.allocated == pytest.approx(ours[3], rel=0.05), (rank, plan.peak.name)


@pytest.mark.world
@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        (TP2_PP2_EP2, ["dtype=bf16", "recompute.layers=2-3"]),
        (PP2_EP2_SPAN, ["dtype=fp32", "recompute.layers=1-4"]),
        pytest.param(TP2_ETP2, ["dtype=fp32"], marks=pytest.mark.full),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else None,
)
def test_peak_equals_a_real_ranks(layout: Layout, extra: list[str]) -> None:
    hold_to_real([*LONG, EVEN, *layout.overrides, *extra], layout.world)


@pytest.mark.full
@pytest.mark.parametrize("layout", [TP2_PP2_EP2, PP2_EP2_SPAN, EP2], ids=lambda one: one.name)
def test_peak_equals_a_real_ranks_at_the_twins_size(layout: Layout) -> None:
    extra = ["device=cpu", EVEN, "recompute.layers=2-15"]
    hold_to_real([*TWIN, *layout.overrides, *extra], layout.world)


@pytest.mark.world
@pytest.mark.parametrize(
    "layout",
    # The third contains the others' groups.
    [*(pytest.param(one, marks=pytest.mark.full) for one in (DP2, EP2)), TP2_PP2_EP2],
    ids=lambda one: one.name,
)
def test_state_is_planned_to_the_byte(layout: Layout) -> None:
    for name, optimizer in OPTIMIZERS.items():
        overrides = [*LONG, *layout.overrides, *optimizer]
        # The first and the last: another stage, and another part of each padded buffer.
        ends = [0, layout.world - 1]
        [built] = run_world(fake_ranks, 1, overrides, layout.world, ends)
        run = resolve_run(overrides, layout.world)
        config, sizes = run.config, run.layout
        for rank, one in zip(ends, built, strict=True):
            state = rank_state(config, sizes, rank)
            assert one[:3] == state, f"{name}, rank {rank}"


def rank_state(config: Any, layout: Any, rank: int) -> tuple[int, int, int]:
    from moe_train.planner.memory.buffers import rank_state_bytes

    state = rank_state_bytes(config, layout, rank, VOCAB)
    return state.weights, state.gradients, state.optimizer


@pytest.mark.world
@pytest.mark.full
def test_peers_are_alike_and_a_steady_schedule_repeats_itself() -> None:
    overrides = [*LONG, *TP2_PP2_EP2.overrides, "dtype=bf16", "batch.global=8"]
    [whole] = run_world(fake_ranks, 1, overrides, 4)
    for one, peer in ((0, 1), (2, 3)):
        assert whole[one][:3] == whole[peer][:3]
        assert whole[one][3] == pytest.approx(whole[peer][3], abs=SCALARS)
    assert abs(whole[0][3] - whole[2][3]) > SCALARS

    enough = enough_microbatches(resolve_run(overrides, 4).layout)
    [short] = run_world(short_ranks, 1, overrides, 4, enough)
    for few, many in zip(short, whole, strict=True):
        assert few[:3] == many[:3]
        assert few[3] == pytest.approx(many[3], abs=SCALARS)
    [shorter] = run_world(short_ranks, 1, overrides, 4, 1)
    assert shorter[0][3] < whole[0][3] - SCALARS


def short_ranks(rank: int, one: int, words: list[str], world: int, count: int) -> list[Any]:
    return fake_ranks(rank, one, words, world, microbatches=count)


PLACEMENTS = ([], ["parallel.placement=stage", "parallel.expert=2"])
ADDED = 1e9
"""Bytes that an update of the 30B may add."""


def updates(rank: int, one: int) -> list[list[int]]:
    """Bytes that gradient norm, clipping and update of the 30B add, by placement: as they are,
    with the optimizer's copies whole, with the norm's copies whole."""
    from unittest import mock

    from moe_train.backend.torch_kernels import adam, gradient_norm
    from moe_train.checkpoint.optimizer_state import initialise_state
    from moe_train.measure.dryrun.prepare import cpu_backend
    from moe_train.measure.dryrun.step import own_state, watched_update
    from moe_train.measure.dryrun.tracker import MemoryTracker
    from moe_train.measure.dryrun.world import fake_engine, fake_world

    def added(tracker: Any, engine: Any) -> int:
        before = tracker.live
        return int(watched_update(engine, tracker).bytes - before)

    results = []
    for placement in PLACEMENTS:
        run = resolve_run(["experiment=moe_30b_8x64gb", *placement], 8)
        backend = cpu_backend(run.config)
        with fake_world(rank, 8), MemoryTracker() as tracker:
            engine = fake_engine(run.with_vocabulary(50257, "test"), backend)
            initialise_state(engine.optimizer)
            own_state(tracker, engine)
            sizes = [added(tracker, engine)]
            with mock.patch.object(adam.TorchAdam, "scratch_bytes", 1 << 60):
                sizes.append(added(tracker, engine))
            with mock.patch.object(gradient_norm, "PIECE", 1 << 60):
                sizes.append(added(tracker, engine))
            results.append(sizes)
    return results


@pytest.mark.world
def test_the_update_of_the_30b_adds_less_than_a_gigabyte() -> None:
    from moe_train.backend.torch_kernels.adam import TorchAdam
    from moe_train.planner.memory.stages import SCRATCH_BYTES

    assert TorchAdam.scratch_bytes == SCRATCH_BYTES
    [span, stage] = run_world(updates, 1)[0]
    for as_it_is, whole_copies, _ in (span, stage):
        assert as_it_is < ADDED
        assert as_it_is == pytest.approx(SCRATCH_BYTES, rel=0.05)
        assert whole_copies > 10 * ADDED
    assert stage[2] > ADDED, "32 experts of a layer are one matrix"


@pytest.mark.world
def test_gradients_that_are_copied_whole_are_the_peak() -> None:
    """16-bit gradients without the precision-aware optimizer: Megatron makes fp32 copies."""
    overrides = [*LONG, "optim.distributed=true", "optim.grad_dtype=bf16", "dtype=bf16",
             "recompute=all", "model.hidden=512", "data.sequence=64"]  # fmt: skip
    [[rank]] = run_world(fake_ranks, 1, overrides, 1)
    assert rank[4] == "optimizer update"
    run = resolve_run(overrides, 1)
    config, layout = run.config, run.layout
    plan = stage_memory(
        Plan(config, layout, VOCAB, assumptions=Assumptions(fused=False, fragmentation=0.0)), 0
    )
    assert plan.peak.name == "optimizer update"
    assert plan.allocated == pytest.approx(rank[3], rel=0.05)


def run_command(rank: int, one: int, argv: list[str]) -> int:
    from moe_train.cli import main

    return main(argv)


@pytest.mark.world
def test_command_reports_every_rank(tmp_path: Path) -> None:
    file = tmp_path / "dryrun.json"
    args = ["--ranks", "all", "--recompute", "none,all", "--json", str(file)]
    overrides = [*LONG, *PP2_EP2_SPAN.overrides]
    busy = tmp_path / "busy.json"
    more = ["--ranks", "1", "--recompute", "none", "--imbalance", "1.5", "--device-like"]
    log = tmp_path / "log"
    [code] = run_world(run_command, 1, ["dryrun", *overrides, *args], log=log)
    assert code == 0
    assert "micro-batch" in log.read_text()
    [code] = run_world(run_command, 1, ["dryrun", *overrides, *more, "--json", str(busy)])
    assert code == 0
    report = json.loads(file.read_text())
    assert [(one["rank"], one["recompute"]) for one in report["ranks"]] == [
        (0, "none"), (1, "none"), (0, "all"), (1, "all"),
    ]  # fmt: skip
    for one in report["ranks"]:
        peak = one["peak"]
        assert sum(peak["categories"].values()) == peak["bytes"]
        assert one["planned"]["peak_bytes"] / peak["bytes"] - 1 == one["difference"]
        moving = sum(peak["modules"].values())
        assert moving == peak["bytes"] - sum(one[k] for k in ("weights", "gradients", "optimizer"))
    none, every = (report["ranks"][i]["peak"]["categories"]["activations"] for i in (0, 2))
    assert none > 1.3 * every
    [skewed] = json.loads(busy.read_text())["ranks"]
    assert skewed["peak"]["bytes"] > report["ranks"][1]["peak"]["bytes"]


def test_overlap_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_train.cli import main

    overrides = [*SMALL, *PP2_EP2_SPAN.overrides, "parallel.overlap_expert_comm=true"]
    assert main(["dryrun", *overrides, "--world", "2"]) == 2
    assert "parallel.overlap_expert_comm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(["--ranks", "9"], ["--ranks", "-1"], ["--imbalance", "0.5"], ["--imbalance", "inf"]),
        *(["--microbatches", "0"], ["--json", "/nowhere/dryrun.json"]),
    ],
)
def test_senseless_questions_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_train.cli import main

    args = [f"{words[0]}={words[1]}"]
    assert main(["dryrun", *SMALL, "--world", "1", *args]) == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["none", "2-15", "all"])
@pytest.mark.parametrize("reading", READINGS)
def test_closed_form_at_full_size(reading: str, policy: str) -> None:
    [rows] = run_world(full_size, 1, reading, policy, timeout=1200)
    assert len(rows) == (1 if reading == "TP2.EP8" else 4)
    for row in rows:
        assert abs(row.difference) < ALLOWED, row
        assert abs(row.activation_difference) < ALLOWED, row


def full_size(rank: int, one: int, reading: str, policy: str) -> list[Any]:
    return rows(reading, policy)

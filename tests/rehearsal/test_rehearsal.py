"""The CUDA program without a GPU: it runs, it computes what the CPU does, planted faults show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.features.schedules import ticks
from moe_train.rehearsal.library import obstacle
from moe_train.rehearsal.rank import Case, RankReport
from moe_train.rehearsal.rehearse import rehearse
from moe_train.testing.layouts import EP2, PP2_EP2_SPAN, SMALL, TP2_PP2_EP2
from moe_train.testing.runs import train_run

pytestmark = [
    pytest.mark.world,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
    pytest.mark.timeout(600),
]

STEPS, LAYERS, MICROBATCHES = 2, 4, 4
BASE = [*SMALL, f"train.steps={STEPS}", "dtype=bf16", "log.console=none"]
SAVED = [f"checkpoint.every={STEPS}"]
RECALLED = [f"train.steps={STEPS + 1}", "checkpoint.resume=auto"]
ONE = ["train.steps=1"]
OVERLAP = "parallel.overlap_expert_comm=true"
FAULTS = "tests.support.rehearsal_faults:"
CHECKS = {
    "runtime": 2,
    "threads": 2,
    "memory_is_shared": 1,
    "random_numbers": 1,
    "substitutes": 1,
    "kernels_are_needed": 1,
    "operands": 1,
    "reads": 1,
    "communicator": 2,
    "groups_without_communicators": 1,
    "listing": 2,
}
"""What is held to the real thing, function by function of rehearsal_checks.py: ranks."""


def cases(folder: Path) -> dict[str, Case]:
    """Every case of the default suite, by name."""

    def case(name: str, *overrides: str, run: str = "", **options: Any) -> Case:
        named = (f"run.dir={folder}", f"run.name={run or name}")
        return Case((*BASE, *named, *overrides), **options)

    def fault(name: str, *overrides: str, **options: Any) -> Case:
        return case(name, *ONE, *overrides, plant=f"{FAULTS}{name}", **options)

    return {
        "one": case("one", *SAVED),
        "continued": case("continued", *SAVED, *RECALLED, run="one"),
        "span": case("span", *SAVED, *PP2_EP2_SPAN.overrides, world=2),
        "stage": case("stage", *ONE, *EP2.overrides, world=2),
        "full": case("full", *ONE, available_gb=0.02),
        **{
            name: fault(name)
            for name in ("router_tensor", "optimizer_state", "host_index", "layer_item")
        },
        # A world of one has no NCCL.
        "host_collective": fault("host_collective", *EP2.overrides, world=2),
        "rng_state": fault("rng_state", "checkpoint.every=1"),
        "saved_state": fault("saved_state", "checkpoint.every=1"),
        **{
            name: Case((), world, instead=f"tests.support.rehearsal_checks:{name}")
            for name, world in CHECKS.items()
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsed")


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, list[RankReport]]:
    """Reports of all ranks by case, from one server."""
    args = cases(folder)
    with (folder / "log").open("w") as log:
        return dict(zip(args, rehearse(list(args.values()), log), strict=True))


@pytest.mark.parametrize("check", CHECKS)
def test_what_stands_in_behaves_like_the_real_thing(reports: Any, check: str) -> None:
    for rank in reports[check]:
        assert not rank.failure, rank.failure


def losses(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, lines) if "loss_hex" in one]
    return [(one["loss_hex"], one["grad_norm_hex"]) for one in steps]


def test_one_rank_trains_saves_and_continues(reports: Any, folder: Path) -> None:
    [first], [second] = reports["one"], reports["continued"]
    assert first.sound, first
    assert second.sound, second
    assert first.copies_at("save") > 0
    assert len(losses(folder / "one")) == STEPS + 1


def test_both_stages_of_span_train_and_save(reports: Any, folder: Path) -> None:
    for rank in reports["span"]:
        assert rank.sound, rank
    assert (folder / "span" / "checkpoints" / f"step_{STEPS:08}").exists()


def test_the_cuda_program_computes_what_the_cpu_program_does(reports: Any, folder: Path) -> None:
    cpu = train_run(folder / "cpu", [*BASE, f"train.steps={STEPS + 1}"])
    assert losses(cpu.folder) == losses(folder / "one")


def test_span_reads_the_device_once_a_slot_and_layer(reports: Any) -> None:
    stages = PP2_EP2_SPAN.sizes["pipeline"]
    slots = sum(1 for tick in ticks(stages, MICROBATCHES) if tick.forward)
    for rank in reports["span"]:
        assert rank.copies_at("layer") == STEPS * slots * LAYERS // stages
        assert rank.copies_at("schedule") == 0


def test_megatrons_layers_read_nothing_back_but_counts(reports: Any) -> None:
    for rank in (*reports["one"], *reports["stage"]):
        assert rank.copies_at("layer") > 0
        assert rank.copies_at("layer", "item") == 0
        assert rank.copies_at("schedule") == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("router_tensor", "MixedDevices: layer"),
        ("optimizer_state", "MixedDevices: update"),
        ("host_collective", "a tensor of the host in a collective of NCCL"),
    ],
)
def test_operands_on_the_host_are_refused(reports: Any, fault: str, says: str) -> None:
    rank = reports[fault][0]
    assert not rank.sound
    assert says in rank.failure


@pytest.mark.parametrize(
    ("fault", "place", "says"),
    [
        ("host_index", "layer", "index with an index on the host"),
        ("saved_state", "save", "ColumnParallelLinear.weight"),
        ("rng_state", "save", "random state"),
    ],
)
def test_what_a_gpu_takes_and_should_not_is_found(
    reports: Any, fault: str, place: str, says: str
) -> None:
    [rank] = reports[fault]
    assert not rank.sound
    assert any(one["place"] == place and says in one["kind"] for one in rank.findings), rank


def test_an_item_in_a_layer_is_counted(reports: Any) -> None:
    [rank] = reports["layer_item"]
    assert rank.copies_at("layer", "item") == LAYERS * MICROBATCHES


def test_memory_that_runs_out_ends_as_such(reports: Any) -> None:
    [rank] = reports["full"]
    assert rank.code == 7, rank


@pytest.mark.full
def test_a_thread_with_another_device_is_found(tmp_path: Path) -> None:
    overrides = (*BASE, *ONE, *PP2_EP2_SPAN.overrides, OVERLAP, f"run.dir={tmp_path}")
    sound, planted = rehearse(
        [Case(overrides, 2), Case(overrides, 2, plant=f"{FAULTS}wrong_device")]
    )
    assert all(rank.sound for rank in sound), sound
    assert not planted[0].findings
    assert any("cuda:0 is current" in one["kind"] for one in planted[1].findings)


@pytest.mark.full
def test_a_group_of_four_trains_and_saves(tmp_path: Path) -> None:
    overrides = (*BASE, *SAVED, *TP2_PP2_EP2.overrides, f"run.dir={tmp_path}")
    [ranks] = rehearse([Case(overrides, 4)])
    assert all(rank.sound for rank in ranks), ranks

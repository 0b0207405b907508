"""Every router and recompute option trains, and says the same in every layout where it can."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.parallel.rules import per_rank_options
from moe_train.planner.resolution import resolve_run
from moe_train.testing.world import run_world
from tests.support.document import document
from tests.support.engines import micro_batches, open_engine, shards

VOCAB, SEQUENCE, BATCH, STEPS = 128, 16, 8, 3
SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.experts=8"),
    *("model.expert_hidden=24", f"data.sequence={SEQUENCE}", f"model.vocab={VOCAB}"),
    # One sequence a micro-batch: whatever a router does per micro-batch, layouts share it.
    *(f"batch.global={BATCH}", "batch.micro=1", "optim.lr=3e-3", "optim.warmup_steps=0"),
    *("model.init_std=0.1", "recompute=none", "parallel=single"),
]
R = "model.router."
EP2, TP2EP2 = ("parallel.expert=2",), ("parallel.tensor=2", "parallel.expert=2")
BOTH = (EP2, TP2EP2)

# name -> overrides, layouts whose result equals one process's (for the others see
# `moe_train.parallel.rules.per_rank_options`).
OPTIONS: dict[str, tuple[list[str], tuple[tuple[str, ...], ...]]] = {
    "softmax": ([], BOTH),
    "sigmoid": ([R + "score=sigmoid"], BOTH),
    "aux": ([R + "balancing=aux", R + "aux_coeff=0.1"], BOTH),
    "seq_aux": ([R + "balancing=seq_aux", R + "aux_coeff=0.1"], BOTH),
    "global_aux": ([R + "balancing=global_aux", R + "aux_coeff=0.1"], (TP2EP2,)),
    "sinkhorn": ([R + "balancing=sinkhorn"], (EP2,)),
    "none": ([R + "balancing=none"], BOTH),
    "expert_bias": (
        [R + "score=sigmoid", R + "expert_bias=true", R + "expert_bias_rate=0.01"],
        BOTH,
    ),
    "z_loss": ([R + "z_coeff=0.01"], BOTH),
    "capacity_probs": ([R + "capacity_factor=0.8"], (EP2,)),
    "capacity_position": ([R + "capacity_factor=0.8", R + "drop_policy=position"], (EP2,)),
    "pad_to_capacity": ([R + "capacity_factor=1.0", R + "pad_to_capacity=true"], (EP2,)),
    "groups": ([R + "groups=4", R + "groups_per_token=1"], BOTH),
    "pre_softmax": ([R + "pre_softmax=true"], BOTH),
    "top1": ([R + "pre_softmax=true", "model.experts_per_token=1"], BOTH),
    "scaling": ([R + "scaling_factor=2.5", R + "pre_softmax=true"], BOTH),
    "force_balance": ([R + "force_balance=true"], ()),
    "shared": (["model.shared_expert_hidden=16"], BOTH),
    "gqa": (["model.kv_heads=2"], BOTH),
    "tied": (["model.tied_embeddings=true"], BOTH),
    "qk_norm_head": (["model.qk_norm=head", "model.kv_heads=2"], BOTH),
    "qk_norm_full": (["model.qk_norm=full", "model.kv_heads=2"], BOTH),
}
PARITY = Path(__file__).parents[2] / "docs" / "parity.md"
PER_RANK = "Counted per rank"
CONDITIONS = (
    "Options that Megatron computes per rank: another layout has another curve, and a warning at "
    "its start. 2 ranks against a single process, 3 steps, largest relative difference."
)
MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def _train(rank: int, world: int, layout: tuple[str, ...], cases: dict[str, list[str]]) -> Any:
    """Results by case; all in one world, each with groups and an engine of its own."""
    from moe_train.backend.groups import close_world
    from moe_train.errors import MoeTrainError
    from moe_train.train.step import train_step

    tokens = np.random.default_rng(3).integers(0, VOCAB, (BATCH, SEQUENCE + 1))
    answers: dict[str, Any] = {}
    for name, overrides in cases.items():
        try:
            engine = open_engine(rank, world, [*SMALL, *overrides, *layout], VOCAB)
        except MoeTrainError as refusal:
            answers[name] = str(refusal)
            continue
        steps = []
        for step in range(1, STEPS + 1):
            result = train_step(engine, micro_batches(engine, tokens), step)
            stats = result.routing
            steps.append(
                {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "aux": stats.aux_loss,
                    "z": stats.z_loss,
                    "dropped": stats.dropped,
                    "tokens": stats.tokens_LE.sum().item(),
                    "busiest": stats.tokens_LE.max().item(),
                }
            )
        bias = [s.data for s in shards(engine) if s.key.endswith("expert_bias")]
        answers[name] = steps, np.concatenate(bias) if bias else None
        close_world()
    return answers


@cache
def single() -> dict[str, Any]:
    cases = {name: overrides for name, (overrides, _) in OPTIONS.items()}
    answers: dict[str, Any] = run_world(_train, 1, (), cases)[0]
    return answers


LONG = ("sigmoid", "aux", "none", "pre_softmax", "top1", "scaling")
"""Options of the long grid: others in the default suite contain what they change."""


@cache
def spread(layout: tuple[str, ...], long: bool = False) -> dict[str, Any]:
    cases = {name: case for name, (case, _) in OPTIONS.items() if (name in LONG) == long}
    if layout == EP2:
        # TP2.EP2 has the rest, and EP2 in it.
        cases = {name: case for name, case in cases.items() if OPTIONS[name][1] != BOTH}
    ranks = run_world(_train, 2, layout, cases)
    for name, (steps, _) in ranks[0].items():
        assert ranks[1][name][0] == steps, f"{name}: ranks tell different numbers"
    answers: dict[str, Any] = ranks[0]
    return answers


def column(answer: Any, name: str) -> list[float]:
    return [step[name] for step in answer[0]]


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains(option: str) -> None:
    answer = single()[option]
    assert not isinstance(answer, str), answer
    assert np.isfinite(column(answer, "loss")).all() and min(column(answer, "grad_norm")) > 0
    # The same batch again and again: the loss falls, forced random routing included.
    assert column(answer, "loss")[-1] < column(answer, "loss")[0]


@pytest.mark.world
@pytest.mark.parametrize(
    ("option", "layout"),
    [
        pytest.param(
            name,
            layout,
            id=f"{name}-{'tp2ep2' if layout is TP2EP2 else 'ep2'}",
            marks=[pytest.mark.full] if name in LONG else [],
        )
        for name, (_, layouts) in OPTIONS.items()
        for layout in (layouts if TP2EP2 not in layouts else (TP2EP2,))
    ],
)
def test_option_is_the_same_in_layouts(option: str, layout: tuple[str, ...]) -> None:
    here, there = single()[option], spread(layout, option in LONG)[option]
    assert not isinstance(there, str), there
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("aux", 1e-5), ("z", 1e-5)):
        wanted = pytest.approx(column(here, name), rel=tolerance, abs=1e-9)
        assert column(there, name) == wanted, name
    for name in ("dropped", "tokens", "busiest"):
        assert column(there, name) == column(here, name), name
    if here[1] is not None:
        np.testing.assert_allclose(there[1].ravel(), here[1].ravel(), atol=1e-7)


def warnings(overrides: list[str], world: int) -> dict[str, str]:
    run = resolve_run(["device=cpu", *SMALL, *overrides], world)
    return per_rank_options(run.config, run.layout)


@pytest.mark.world
def test_per_rank_options_do_depend_on_the_layout() -> None:
    """Should Megatron make one of these layout-invariant, the table above can say so."""
    for name, layout in (("EP2", EP2), ("TP2.EP2", TP2EP2)):
        for option, (overrides, layouts) in OPTIONS.items():
            if layout in layouts:
                continue
            [warned] = warnings([*overrides, *layout], 2)
            moved = {
                metric: np.abs(
                    np.divide(
                        column(spread(layout)[option], metric), column(single()[option], metric)
                    )
                    - 1
                ).max()
                for metric in ("loss", "grad_norm")
            }
            assert moved["grad_norm"] > 1e-4, (option, layout)
            document(PARITY, PER_RANK, CONDITIONS, "option, layout", ["loss", "gradient norm"])
            row = [f"{moved[metric]:.1e}" for metric in ("loss", "grad_norm")]
            document(PARITY, PER_RANK, CONDITIONS, f"`{warned}` ({option}), {name}", row)


def test_equal_layouts_warn_of_no_option() -> None:
    for option, (overrides, layouts) in OPTIONS.items():
        for layout in layouts:
            assert not warnings([*overrides, *layout], 2), option
        assert not warnings(overrides, 1), option


def test_options_are_not_the_default() -> None:
    """An option that silently does nothing would pass everything above."""
    plain = column(single()["softmax"], "grad_norm")
    same = [
        name
        for name in OPTIONS
        if name not in ("softmax",)
        and column(single()[name], "grad_norm") == pytest.approx(plain, rel=1e-6)
    ]
    assert same == []


def test_losses_of_balance_are_told() -> None:
    for option in ("aux", "seq_aux", "global_aux"):
        assert min(column(single()[option], "aux")) > 0.05, option
    assert column(single()["none"], "aux") == [0.0] * STEPS
    assert min(column(single()["z_loss"], "z")) > 0
    assert column(single()["softmax"], "z") == [0.0] * STEPS


def test_assignments_are_counted() -> None:
    """Every token goes to k experts in every layer, less what was dropped."""
    full = BATCH * SEQUENCE * 2 * 2
    for option, (steps, _) in single().items():
        wanted = full / 2 if option == "top1" else full
        for step in steps:
            assert step["tokens"] + step["dropped"] == wanted, option
        if option.startswith("capacity"):
            # ceil(16 tokens x 2 / 8 experts x 0.8) = 4 of a micro-batch's tokens.
            assert min(column((steps, None), "dropped")) > 0
            assert max(column((steps, None), "busiest")) <= 4 * BATCH


def test_drop_policies_differ() -> None:
    probs, position = single()["capacity_probs"], single()["capacity_position"]
    assert column(probs, "loss") != column(position, "loss")
    assert column(probs, "dropped")[0] == column(position, "dropped")[0]


def test_expert_bias_moves_by_its_rate() -> None:
    bias = single()["expert_bias"][1]
    assert bias.shape == (2, 8)
    assert 0 < np.abs(bias).max() <= STEPS * 0.01 + 1e-6
    # Each step moves by the rate, up or down (or stays, at exactly the mean).
    assert np.allclose(np.round(bias / 0.01), bias / 0.01, atol=1e-3)


@cache
def recomputed(layout: tuple[str, ...], world: int) -> dict[str, Any]:
    shared = "model.shared_expert_hidden=16"
    cases = {"plain": [shared]} | {
        module: [shared, f"recompute.modules=[{module}]"] for module in MODULES
    }
    cases["all"] = [shared, "recompute.layers=all"]
    cases["one"] = [shared, "recompute.layers=2"]
    answers: dict[str, Any] = run_world(_train, world, layout, cases)[0]
    return answers


@pytest.mark.world
@pytest.mark.parametrize("variant", [*MODULES, "all", "one"])
@pytest.mark.parametrize(
    ("layout", "world"),
    [
        pytest.param((), 1, id="single"),
        # What a module recomputes does not depend on the layout but for its collectives.
        pytest.param(TP2EP2, 2, id="tp2ep2", marks=pytest.mark.full),
    ],
)
def test_recomputing_changes_nothing(variant: str, layout: tuple[str, ...], world: int) -> None:
    plain, again = recomputed(layout, world)["plain"], recomputed(layout, world)[variant]
    assert not isinstance(again, str), again
    assert column(again, "loss") == pytest.approx(column(plain, "loss"), rel=1e-6)
    assert column(again, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-5)
    # A router that runs twice must not count twice.
    for name in ("tokens", "busiest", "aux"):
        assert column(again, name) == pytest.approx(column(plain, name), rel=1e-6), name

"""Each rule refuses, by the field's name and with a value that is then legal."""

from __future__ import annotations

import pytest

from moe_train.config.compose import compose
from moe_train.errors import ConfigFaults
from moe_train.parallel.sizes import layout_of, legal_layouts
from moe_train.planner.legality import check
from moe_train.planner.resolution import resolve_run
from moe_train.planner.search.automatic import resolve

GPU = "hardware=h100_80gb"
FP8 = [GPU, "dtype=fp8"]


def faults(overrides: list[str], world: int) -> dict[str, str]:
    with pytest.raises(ConfigFaults) as refused:
        resolve_run(overrides, world)
    return {fault.field: f"{fault.problem} {fault.fix}" for fault in refused.value.faults}


@pytest.mark.parametrize(
    ("overrides", "world", "field", "word"),
    [
        (["parallel.expert=3"], 6, "parallel.expert", "[1, 2, 4"),
        (["parallel.tensor=3"], 3, "parallel.tensor", "model.heads=16"),
        (["parallel.pipeline=3"], 3, "parallel.pipeline", "[1, 2, 4"),
        (["parallel=tp2_pp4_ep8"], 8, "world size", "ETP x EP x PP"),
        (["parallel=tp2_pp4"], 6, "world size", "TP x CP x PP"),
        (["parallel.tensor=8", "model.kv_heads=16", "model.heads=16", "model.vocab_multiple=4"], 8,
         "model.vocab_multiple", "=8"),
        (["parallel.tensor=2", "data.sequence=127"], 2, "data.sequence", "[126, 128]"),
        (["parallel.context=2", "data.sequence=126"], 2, "data.sequence", "2 x parallel.context"),
        (["parallel.virtual_pipeline=2", "parallel.pipeline=1"], 1, "parallel.virtual_pipeline",
         "more than one stage"),
        (["parallel.virtual_pipeline=3", "parallel.pipeline=2"], 2, "parallel.virtual_pipeline",
         "[1, 2, 4, 8]"),
        (["parallel.virtual_pipeline=2", "parallel.pipeline=2", "batch.microbatches=3"], 2,
         "batch.microbatches", "4"),
        (["batch.global=7", "parallel.tensor=1", "parallel.pipeline=1"], 2, "batch.global",
         "[6, 8]"),
        (["parallel.overlap_expert_comm=true", "parallel.placement=stage"], 2,
         "parallel.overlap_expert_comm", "="),
        (["parallel.overlap_param_gather=true"], 2, "parallel.overlap_param_gather", "distributed"),
        (["optim.precision_aware=true"], 1, "optim.precision_aware", "optim.distributed=true"),
        (["optim.moment_dtype=bf16"], 1, "optim.moment_dtype", "precision_aware"),
        (["optim.grad_dtype=bf16"], 1, "optim.grad_dtype", "fp32"),
        (["megatron.optimizer.store_param_remainders=true"], 1,
         "megatron.optimizer.store_param_remainders", "12 bytes"),
        (["parallel.placement=stage", "parallel.dispatcher=flex", "parallel.expert=1"], 8,
         "parallel.dispatcher", "ETP x EP"),
        (["parallel.tensor=8", "model.kv_heads=1", "model.heads=8", "model.head_dim=2"], 8,
         "parallel.tensor", "20 rows of Q, K and V"),
        ([*FP8, "recompute=none", "recompute.modules=[moe_act]"], 1, "recompute.modules",
         "fp8_recipe"),
        ([*FP8, "model.expert_hidden=40"], 1, "model.expert_hidden", "16 wide"),
        (["device=cpu", "model.expert_hidden=50"], 1, "model.expert_hidden", "[48, 52]"),
        (["device=cpu", "parallel.context=2"], 2, "parallel.context", "TransformerEngine"),
        (["device=cpu", "megatron.transformer.window_size=[8,0]"], 1,
         "megatron.transformer.window_size", "the whole sequence"),
        (["device=cpu", "backend.kernels=te"], 1, "backend.kernels", "auto or torch"),
        (["device=cpu", "backend.compile=true"], 1, "backend.compile", "bitwise"),
        (["backend.kernels=apex"], 1, "backend.kernels", "auto, te, torch"),
        ([*FP8, "backend.kernels=torch"], 1, "dtype", "TransformerEngine"),
        ([GPU, "backend.kernels=torch", "parallel.context=2"], 2, "parallel.context", "kernels=te"),
        ([GPU, "backend.kernels=torch", "parallel.dispatcher=flex", "parallel.expert=2"], 2,
         "parallel.dispatcher",
         "kernels=te"),
        ([GPU, "backend.kernels=torch", "model.expert_hidden=50"], 1, "model.expert_hidden",
         "[48, 52]"),
        (["model.router.expert_bias=true"], 1, "model.router.expert_bias", "sigmoid"),
        (["model.experts_per_token=1"], 1, "model.router.pre_softmax", "sigmoid"),
        (["model.experts_per_token=65"], 1, "model.experts_per_token", "64"),
        (["model.router.balancing=sinkhorn", "model.router.capacity_factor=1"], 1,
         "model.router.capacity_factor", "aux"),
        (["model.router.pad_to_capacity=true"], 1, "model.router.pad_to_capacity", "capacity"),
        (["model.router.groups=4"], 1, "model.router.groups_per_token", "both"),
        (["model.router.groups=5", "model.router.groups_per_token=1"], 1, "model.router.groups",
         "[1, 2, 4"),
        (["model.router.groups=4", "model.router.groups_per_token=3"], 1,
         "model.router.groups_per_token", "1 to 2"),
        (["model.kv_heads=3"], 1, "model.kv_heads", "[1, 2, 4, 8, 16]"),
        (["model.head_dim=7"], 1, "model.head_dim", "even"),
        (["model.head_dim=null", "model.heads=12"], 1, "model.heads", "model.head_dim"),
        (["recompute.layers=2-17"], 1, "recompute.layers", "1-16"),
        (["recompute.layers=5-2"], 1, "recompute.layers", "2-5"),
        (["recompute.layers=some"], 1, "recompute.layers", "none"),
        (["recompute.modules=[moe_act]"], 1, "recompute.modules", "recompute.layers=none"),
        (["recompute=none", "recompute.modules=[mope]"], 1, "recompute.modules[0]", "moe"),
        (["dtype=fp16"], 1, "dtype", "bf16"),
        (["device=cpu", "dtype=fp8"], 1, "dtype", "bf16"),
        (["device=cpu", "parallel.dispatcher=flex"], 2, "parallel.dispatcher", "alltoall"),
        (["device=gpu"], 1, "device", "cpu"),
        *(
            ([f"data.split='{split}'"], 1, "data.split", "98,2,0")
            for split in ("1", "a,1,1", "1,2,3,4", "0,0,0", "1,-1,1", "1.2.3,1,1", "1e1,2,3", "")
        ),
        (["batch.micro=0"], 1, "batch.micro", ">= 1"),
        (["optim.lr=0.001", "optim.min_lr=1"], 1, "optim.min_lr", "0.001"),
        (["optim.warmup_steps=5", "optim.decay_steps=5"], 1, "optim.decay_steps", "6"),
        (["optim.beta2=1.0"], 1, "optim.beta2", "0.95"),
        (
            ["parallel.placement=span", "parallel.virtual_pipeline=2"],
            8,
            "parallel.virtual_pipeline",
            "1",
        ),
        (
            ["parallel.placement=span", *FP8],
            8,
            "dtype",
            "parallel.placement=stage",
        ),
        (
            ["parallel.placement=span", "parallel.dispatcher=allgather"],
            8,
            "parallel.dispatcher",
            "alltoall",
        ),
    ],
)  # fmt: skip
def test_a_violated_rule_is_named(overrides: list[str], world: int, field: str, word: str) -> None:
    result = faults(overrides, world)
    assert field in result, result
    assert word in result[field]


def test_faults_of_form_value_and_layout_come_together() -> None:
    result = faults(["model.layer=3", "optim.lr=-1", "parallel=tp2_pp4_ep8", "batch.global=3"], 8)
    assert {"model.layer", "optim.lr", "world size"} <= set(result)


def test_a_refused_value_does_not_bring_faults_of_its_default() -> None:
    result = faults(['model.experts="64"', "parallel.expert=2"], 2)
    assert set(result) == {"model.experts"}


def test_named_layouts_are_legal_when_pasted() -> None:
    result = faults(["parallel=tp2_pp4_ep8"], 8)
    lines = [line.split() for line in result["world size"].splitlines()[1:]]
    assert lines
    for line in lines:
        layout = resolve_run(line, 8).layout
        assert layout.world == 8


@pytest.mark.parametrize(
    ("overrides", "world", "tag"),
    [
        ([], 1, "single"),
        ([], 2, "DP2"),
        ([], 4, "DP2.PP2"),
        ([], 8, "TP2.PP4.EP8.span"),
        (["experiment=single"], 1, "single"),
        (["experiment=moe_30b_8x64gb"], 8, "TP2.PP4.EP8.span"),
        (["parallel.placement=stage"], 8, "TP2.PP4.EP2"),
        (["experiment=moe_30b_8x64gb"], 32, "DP4.TP2.PP4.EP8.span"),
        (["experiment=moe_30b_32x64gb"], 32, "TP2.PP4.EP8"),
        (["parallel.tensor=1"], 8, "DP2.PP4.EP4.span"),
        (["parallel.expert=1"], 2, "DP2"),
        (["parallel.tensor=2", "parallel.expert=1", "parallel.expert_tensor=2"], 2, "TP2.ETP2"),
        (["parallel=tp2_pp4_etp2"], 8, "TP2.PP4.ETP2"),
        (["parallel=tp2_ep8"], 8, "TP2.EP8"),
        (["parallel.pipeline=2", "parallel.expert=2"], 2, "PP2.EP2.span"),
    ],
)
def test_automatic_layouts(overrides: list[str], world: int, tag: str) -> None:
    if tag == "PP2":
        # Two stages on two ranks leave one rank a stage: EP2 has nowhere to go.
        assert "world size" in faults(overrides, world)
        return
    run = resolve_run(overrides, world)
    config, layout = run.config, run.layout
    assert layout.tag == tag
    assert None not in vars(config.parallel).values()
    assert resolve(config, world) == config


def test_interleaved_overlap_is_legal_when_its_conditions_hold() -> None:
    layout = resolve_run(
        [
            "parallel.overlap_expert_comm=true", "recompute=none", "dtype=bf16",
            "parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2",
            "parallel.expert=2",
        ],
        4,
    ).layout  # fmt: skip
    assert layout.tag == "PP2.VPP2.EP2"


def test_search_yields_legal_layouts_only_and_keeps_what_is_set() -> None:
    config = compose(["parallel.tensor=2"])
    result = legal_layouts(config, 16)
    assert result
    assert {one.tensor for one in result} == {2}
    for one in result:
        pasted = compose(["parallel=auto", *one.overrides()])
        assert check(resolve(pasted, 16), 16) == []
        assert layout_of(resolve(pasted, 16), 16) == one


def test_global_batch_fixes_the_product_for_every_data_size() -> None:
    config = compose(["batch.global=32", "batch.micro=2"])
    assert [config.batch.per_step(data) for data in (1, 2, 4)] == [16, 8, 4]
    assert {config.batch.sequences(data) for data in (1, 2, 4)} == {32}
    assert compose(["batch.accumulation=4"]).batch.sequences(2) == 64


def test_large_worlds_are_searched() -> None:
    layout = resolve_run(["experiment=moe_30b_8x64gb", "parallel=auto"], 16384).layout
    assert layout.world == 16384

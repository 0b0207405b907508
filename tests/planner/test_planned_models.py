"""Models and stages that are planned only: counts against Transformers, slots against Megatron."""

from __future__ import annotations

import pytest

from benchmarks.published.rows import models
from moe_train.config.compose import collect
from moe_train.config.hardware import MachineFacts
from moe_train.config.model import ModelConfig
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import layer_parameters, model_parameters, rank_parameters
from moe_train.parallel.stages import layers_of, slots_of, stages_faults, text_of
from moe_train.planner.estimate import estimate
from moe_train.planner.resolution import resolve_launch, resolve_run

LATENT = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "experts": 8,
    "experts_per_token": 2,
    "expert_hidden": 32,
    "shared_expert_hidden": 48,
    "dense_layers": 1,
    "dense_hidden": 96,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "vocab": 128,
    "vocab_multiple": 1,
}


@pytest.mark.parametrize("name", [name for name, one in models().items() if one.parameters])
def test_totals_are_the_published_ones(name):
    one = models()[name]
    model = ModelConfig(**one.model)
    assert model_parameters(model, one.model["vocab"]).total == pytest.approx(
        one.parameters, rel=0.01
    )


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_latent_attention_and_dense_layers_count_as_in_transformers(q_lora_rank):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.DeepseekV3Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        n_shared_experts=1, intermediate_size=96, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=q_lora_rank, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, n_group=1,
        topk_group=1, tie_word_embeddings=False,
    )  # fmt: skip
    config.moe_intermediate_size, config.n_shared_experts = 32, 1
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(config)
    ours = ModelConfig(**LATENT | {"shared_expert_hidden": 32, "q_lora_rank": q_lora_rank})
    assert model_parameters(ours, 128).total == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("text", "stages", "chunks"),
    [
        ("Ett|(ttt|)*30ttL", 8, 4),
        ("E|(t|)*94L", 32, 3),
        ("Et*4|(tttt|)*14tmL", 16, 1),
        ("Et|(tt|)*30mL", 8, 4),
    ],
)
def test_slots_are_megatron_s(text, stages, chunks):
    module = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    kinds = pytest.importorskip("megatron.core.transformer.enums").LayerType
    theirs = module.PipelineParallelLayerLayout(layout=text, pipeline_model_parallel_size=stages)
    layers = layers_of(text)
    layout = Layout(
        stages, pipeline=stages, virtual_pipeline=chunks, layers=sum(layers), stages=layers
    )
    for stage in range(stages):
        for chunk in range(chunks):
            theirs_here = theirs.layout[stage][chunk].count(kinds.decoder)
            assert len(layout.stage_layers(stage, chunk)) == theirs_here
    numbers = [n for stage in range(stages) for n in layout.stage_layers(stage)]
    assert sorted(numbers) == list(range(1, sum(layers) + 1))
    assert layers_of(text_of(layers)) == layers


@pytest.mark.parametrize("text", ["", "tt|L", "Et|(tt|", "Et|x|L", "EtL|tt", "E(t|)*99999L"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"parallel\.stages"):
        slots_of(text)


def test_stages_must_have_the_model_s_layers_and_the_layout_s_slots():
    model = ModelConfig(layers=6)
    assert not list(stages_faults("Et|(tt|)*2tL", model, 4))
    assert len(list(stages_faults("Et|ttL", model, 4))) == 2
    assert len(list(stages_faults("Et|(tt|)*2tmL", model, 4))) == 1


def test_ranks_hold_what_the_model_has():
    model = ModelConfig(**LATENT | {"mtp_layers": 1})
    layout = Layout(
        8, tensor=2, pipeline=2, expert=4, layers=4, experts=8, stages=(3, 1), mtp_layers=1
    )
    ranks = [rank_parameters(model, layout, rank, 128) for rank in range(8)]
    whole = model_parameters(model, 128)
    assert sum(one.experts for one in ranks) == whole.experts
    assert sum(one.attention for one in ranks) == whole.attention * layout.data
    assert sum(one.feed_forward for one in ranks) == whole.feed_forward * layout.data
    routers = layer_parameters(model).router
    assert ranks[-1].replicated - ranks[-1].replicated % 1 >= 2 * routers


def facts() -> MachineFacts:
    return MachineFacts(kind="cpu", count=1, memory_gb=64.0)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("parallel.stages", ["model.layers=3", "parallel.pipeline=2", "parallel.stages='Et|ttL'"]),
        ("model.dense_layers", ["model.dense_layers=1", "model.dense_hidden=64"]),
        ("model.mtp_layers", ["model.mtp_layers=1"]),
        ("model.kv_lora_rank", ["model.kv_lora_rank=16"]),
    ],
)
def test_they_are_planned_with_a_remark_and_refused_at_the_start(field, more):
    common = ["device=cpu", "model=small", "recompute=none", "parallel.placement=stage", *more]
    plan = estimate(resolve_run(common, 2))
    assert any(note.startswith(field) for note in plan.notes)
    assert plan.worst.total > 0 and plan.time.step > 0
    with pytest.raises(ConfigFaults, match=field):
        resolve_launch(common, 2, facts())


def test_stages_are_written_as_overrides():
    overrides = [
        "recompute=none",
        "model.layers=3",
        "parallel.pipeline=2",
        "parallel.stages='Et|ttL'",
        "device=cpu",
    ]
    run = resolve_run(["model=small", "parallel.placement=stage", *overrides], 2)
    again, faults = collect([*run.layout.overrides(), "model=small", "model.layers=3"])
    assert not faults
    assert layers_of(again.parallel.stages) == (1, 2) == run.layout.stages

"""Terms of a layer's time on GPUs: host, imbalance, rows, fp8, overlap; fitted constants."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from moe_train.config.root import Config
from moe_train.parallel.flops import flops_per_token
from moe_train.planner.cost.compute import dense_parts, expert_parts, grouped_share, peak_flops
from moe_train.planner.cost.constants import (
    BOUNDS,
    NEUTRAL,
    Constants,
    constants,
    natural_imbalance,
    using,
)
from moe_train.planner.cost.launches import host_seconds, layer_launches
from moe_train.planner.cost.passes import layer_time
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.plan import Plan
from moe_train.planner.resolution import resolve_run

QWEN = ["model.layers=48", "model.hidden=2048", "model.heads=32", "model.kv_heads=4",
        "model.head_dim=128", "model.experts=128", "model.experts_per_token=8",
        "model.expert_hidden=768", "model.vocab=151936"]  # fmt: skip
ON_H100 = ["hardware=h100_80gb", "dtype=bf16", "data.sequence=4096", "parallel.placement=stage",
           "parallel.auto=false", "recompute=none", "optim.distributed=true",
           "batch.global=256"]  # fmt: skip
GRAPHS = "megatron.transformer.cuda_graph_impl=transformer_engine"


def plan(*words: str, world: int = 16, imbalance: float = 1.0) -> Plan:
    one = Plan.of(resolve_run([*QWEN, *ON_H100, *words], world))
    return replace(one, assumptions=replace(one.assumptions, imbalance=imbalance))


def of(*words: str, world: int = 16, imbalance: float = 1.0) -> StepTime:
    return step_time(plan(*words, world=world, imbalance=imbalance))


@pytest.mark.parametrize("dispatcher", ["alltoall", "flex"])
def test_imbalance_reaches_exchange_and_experts(dispatcher: str) -> None:
    words = ["parallel.expert=16", f"parallel.dispatcher={dispatcher}"]
    times = [of(*words, imbalance=imbalance) for imbalance in (1.0, 2.0, 3.0)]
    for less, more in zip(times, times[1:], strict=False):
        assert sum(more.layer.exchange) > 1.2 * sum(less.layer.exchange)
        assert sum(more.layer.experts) > 1.2 * sum(less.layer.experts)
        assert more.step > less.step
    # A capacity limits what the busiest rank gets, and so what all wait for.
    capped = of(*words[:1], "model.router.capacity_factor=1.5", imbalance=3.0)
    assert sum(capped.layer.exchange) == pytest.approx(
        sum(of(*words[:1], imbalance=1.5).layer.exchange)
    )


def test_a_layer_takes_the_longer_of_kernels_and_launches() -> None:
    small = plan("parallel.expert=8", "data.sequence=256", world=8)
    host = host_seconds(small.config, small.shapes, 1, 48)
    layer = layer_time(small)
    assert layer.forward() == pytest.approx(host[0]) and sum(layer.waiting) > 0
    large = layer_time(plan("parallel.expert=8", "batch.micro=4", world=8))
    assert sum(large.waiting) == 0


def test_launches_are_those_of_a_profile() -> None:
    """151 kernels of a layer with 8 experts a rank (see `moe_train.planner.cost.launches`), of
    which the profile has 6 x 8 grouped products.
    """
    one = plan("parallel.expert=16", "parallel.dispatcher=flex")
    assert one.shapes.local_experts == 8
    counts = layer_launches(one.config, one.shapes)
    apart = sum(sum(count) for name, count in counts.items() if name != "experts")
    assert apart + 6 * 8 == pytest.approx(151, rel=0.1)


def test_graphs_launch_their_part_as_one() -> None:
    scopes = ("", "[moe_router,moe_preprocess]", "[attn,moe_router,moe_preprocess]")
    words = [[GRAPHS, f"megatron.transformer.cuda_graph_scope={scope}"] if scope else []
             for scope in scopes]  # fmt: skip
    words.append(["megatron.transformer.cuda_graph_impl=full_iteration"])
    times = [host_seconds(one.config, one.shapes) for one in (plan(*some) for some in words)]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)


def test_few_rows_an_expert_are_slow() -> None:
    hardware = plan().config.hardware
    shares = [grouped_share(hardware, rows) for rows in (64, 128, 1024, 8192)]
    assert shares == sorted(shares) and shares[-1] <= hardware.grouped_efficiency
    # Half of a tile is lost on average: with one tile's rows a third of the work.
    assert shares[1] == pytest.approx(hardware.grouped_efficiency * 2 / 3)
    assert grouped_share(replace(hardware, tile_rows=0), 1) == hardware.grouped_efficiency


def parts(config: Config, one: Plan) -> dict[str, tuple[float, float]]:
    both = [*dense_parts(config, one.shapes), *expert_parts(config, one.shapes)]
    return {part.name: (part.seconds, part.backward_seconds) for part in both}


def test_fp8_speeds_up_its_products_alone() -> None:
    one = plan("parallel.expert=16")
    bf16, fp8 = parts(one.config, one), parts(replace(one.config, dtype="fp8"), one)
    assert fp8["scores"] == bf16["scores"] and fp8["router"] == bf16["router"]
    for name in ("experts", "projections"):
        assert fp8[name][0] < bf16[name][0] < 2.1 * fp8[name][0]
    assert fp8["fp8 casts"][0] > 0 == bf16["fp8 casts"][0]
    # Router's logits: never above what its own peak allows.
    flops = 2 * one.shapes.N * one.shapes.H * one.shapes.E
    tf32 = peak_flops(one.config) / 2
    assert bf16["router"][1] > 2 * flops / tf32


def test_overlap_hides_a_share_and_costs_compute() -> None:
    words = ["parallel.expert=16", "batch.global=1024"]
    apart, overlapped = of(*words), of(*words, "parallel.overlap_expert_comm=true")
    assert overlapped.step < apart.step
    exchange = sum(apart.layer.exchange)
    hidden = constants(plan().config.hardware).hidden
    assert sum(overlapped.layer.exchange) > (1 - hidden) * exchange
    taken = of(*words, "parallel.overlap_expert_comm=true", "hardware.overlap_share=0.4")
    assert taken.step > overlapped.step


def test_recomputed_modules_take_their_time() -> None:
    plain = of("parallel.expert=16")
    for module in ("core_attn", "layernorm", "moe_act", "moe"):
        again = of("parallel.expert=16", f"recompute.modules=[{module}]")
        assert again.step > plain.step, module
        assert again.layer.forward() == plain.layer.forward()


def test_dense_layers_and_predictions_have_their_price() -> None:
    """A step without experts in its first layers, and one with a second head, by their FLOPs."""
    dense = ["model.dense_layers=8", "model.dense_hidden=6144"]
    plain, first, second = (of("parallel.expert=16", *words) for words in (
        [], dense, ["model.mtp_layers=1"]))  # fmt: skip
    assert first.step < plain.step < second.step
    config = plan("model.mtp_layers=1").config
    work = [flops_per_token(one.model, 4096, 151936).total for one in (config, plan().config)]
    assert second.step / plain.step == pytest.approx(work[0] / work[1], rel=0.05)


def test_constants_are_few_bounded_and_neutral_on_a_cpu() -> None:
    names = [one.name for one in fields(Constants)]
    assert len(names) <= 8 and set(names) == set(BOUNDS)
    for name, (low, high) in BOUNDS.items():
        assert low <= getattr(Constants(), name) <= high
    cpu = Plan.of(resolve_run(["experiment=twin", "device=cpu", "parallel=single"], 1))
    assert constants(cpu.config.hardware) == NEUTRAL
    seconds = step_time(cpu)
    gpu = of("parallel.expert=16")
    slow = Constants(**{name: BOUNDS[name][1] for name in ("host", "elementwise")})
    with using(slow):
        assert of("parallel.expert=16").step > gpu.step
        assert step_time(cpu) == seconds
    assert of("parallel.expert=16") == gpu


def test_natural_routing_is_uneven() -> None:
    even = plan("model.router.force_balance=true").config
    weak, strong = (plan(f"model.router.aux_coeff={weight}").config for weight in (1e-3, 1e-2))
    assert natural_imbalance(even) == 1.0
    assert 1 < natural_imbalance(strong) < natural_imbalance(weak) < 2

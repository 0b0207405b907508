"""Links, traffic, work and step time: each formula against a count of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config
from moe_train.features.schedules import bubble
from moe_train.parallel.flops import flops_per_token
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.shapes import Assumptions, shapes
from moe_train.parallel.sizes import legal_layouts
from moe_train.planner.cost import compute
from moe_train.planner.cost.communication import gradient_traffic, layer_traffic, step_traffic
from moe_train.planner.cost.compute import (
    dense_parts,
    embedding_parts,
    expert_parts,
    head_parts,
    optimizer_seconds,
)
from moe_train.planner.cost.links import (
    Group,
    group,
)
from moe_train.planner.cost.passes import end_times, passes_of
from moe_train.planner.cost.timing import step_time
from moe_train.planner.plan import BAND, Plan, assumptions_of
from moe_train.planner.ranking import ranked
from moe_train.planner.resolution import resolve_run

REFERENCE = ["experiment=moe_30b_8x64gb"]
STAGE = [*REFERENCE, "parallel.placement=stage"]
VOCAB = 50304
_RUNS: dict[tuple[str, ...], tuple[Config, Layout]] = {}


def plan(*words: str, world: int = 8) -> tuple[Config, Layout]:
    key = (*words, str(world))
    if key not in _RUNS:
        run = resolve_run(list(words), world)
        _RUNS[key] = run.config, run.layout
    return _RUNS[key]


def of(config: Config, layout: Layout) -> Plan:
    return Plan(config, layout, VOCAB, assumptions=Assumptions())


def test_the_reference_groups_on_nodes_of_four() -> None:
    config, layout = plan(*REFERENCE)
    assert group(layout, config.hardware, "tp").inside
    assert group(layout, config.hardware, "ep") == Group("ep", 8, 4)
    assert group(layout, config.hardware, "pp").per_node == 2


@pytest.mark.parametrize(
    "words",
    [REFERENCE, [*STAGE, "parallel.expert=2"], [*STAGE, "parallel=tp2_ep8"],
     [*STAGE, "parallel.expert=1", "parallel.expert_tensor=2"]],
)  # fmt: skip
def test_work_of_all_ranks_is_the_models(words: list[str]) -> None:
    """Forward operations of all ranks together, times three, are the model's per token."""
    config, layout = plan(*words)
    z = shapes(config, layout, VOCAB, Assumptions())
    layers = sum(len(layout.stage_layers(s)) for s in range(layout.pipeline)) / layout.pipeline
    # Under span R counts the rows of one layer of every stage.
    each = [*dense_parts(config, z), *expert_parts(config, z)]
    per_rank = layers * sum(part.flops for part in each)
    head = sum(part.flops for part in head_parts(config, z))
    tokens = layout.data * config.data.sequence * config.batch.micro
    work = layout.world * per_rank + layout.world / layout.pipeline * head
    wanted = flops_per_token(config.model, config.data.sequence, VOCAB).total
    assert 3 * work / tokens == pytest.approx(wanted)


def simulate(stages: int, count: int, forward: float, backward: float) -> float:
    """1F1B by longest path: every pass after its stage's previous one and its neighbour's."""
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(stages):
        warm = min(stages - stage - 1, count)
        order = [("f", m) for m in range(warm)]
        for m in range(count - warm):
            order += [("f", warm + m), ("b", m)]
        orders.append(order + [("b", m) for m in range(count - warm, count)])
    clocks, heads = [0.0] * stages, [0] * stages
    while any(head < len(order) for head, order in zip(heads, orders, strict=True)):
        for stage in range(stages):
            if heads[stage] == len(orders[stage]):
                continue
            kind, m = orders[stage][heads[stage]]
            if kind == "f":
                need = done.get(("f", stage - 1, m)) if stage else 0.0
            else:
                need = done.get(("b", stage + 1, m)) if stage < stages - 1 else 0.0
            if need is None:
                continue
            clocks[stage] = max(clocks[stage], need) + (forward if kind == "f" else backward)
            done[kind, stage, m] = clocks[stage]
            heads[stage] += 1
    return max(clocks)


@settings(deadline=None, max_examples=40)
@given(stages=st.integers(1, 6), count=st.integers(1, 12), ratio=st.floats(1.0, 3.0))
def test_bubble_of_1f1b_by_simulation(stages: int, count: int, ratio: float) -> None:
    if count < stages:
        count = stages
    whole = simulate(stages, count, 1.0, ratio)
    assert 1 - count * (1 + ratio) / whole == pytest.approx(bubble(stages, count))


@settings(deadline=None, max_examples=40)
@given(stages=st.integers(1, 16), count=st.integers(1, 64), chunks=st.integers(1, 8))
def test_bubble_shrinks_with_micro_batches_and_chunks(stages: int, count: int, chunks: int) -> None:
    share = bubble(stages, count, chunks)
    assert 0 <= share < 1
    assert bubble(stages, count + 1, chunks) <= share
    assert bubble(stages, count, chunks + 1) <= share
    ideal = chunks * count
    assert share == pytest.approx(1 - ideal / (ideal + stages - 1))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_uniform_stages_wait_for_the_bubble_alone(chunks: int) -> None:
    config, layout = plan(*STAGE, "parallel.expert=2", "recompute.layers=all")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=128))
    # No end weighs: the vocabulary is tiny and messages cost nothing.
    hardware = dataclasses.replace(config.hardware, latency_us=0.0, intra_node_gbps=1e9,
                                   inter_node_gbps=1e9)  # fmt: skip
    config = dataclasses.replace(config, hardware=hardware)
    layout = dataclasses.replace(layout, virtual_pipeline=chunks)
    time = step_time(Plan(config, layout, 128, assumptions=Assumptions()))
    busy = time.microbatches * max(stage.both for stage in time.stages)
    assert 1 - busy / time.pipeline == pytest.approx(bubble(4, 32, chunks), rel=0.02)
    assert time.bubble == pytest.approx(bubble(4, 32, chunks), abs=0.005)


def test_span_has_no_expert_bubble_with_few_micro_batches() -> None:
    """With M < P its step beats 1F1B of the same dense layout where links are no limit."""
    free = ["hardware=h200_141gb", "hardware.intra_node_gbps=100000", "hardware.latency_us=0",
            "batch.microbatches=2", "batch.accumulation=1", "recompute.layers=none",
            "model.experts_per_token=8"]  # fmt: skip
    span = step_time(of(*plan(*REFERENCE, *free))).pipeline
    stage = step_time(of(*plan(*STAGE, "parallel.expert=2", *free))).pipeline
    assert span < stage


def test_the_exchange_between_nodes_decides_on_64_gb_devices() -> None:
    """Spanning experts pay for the network of 4-GPU nodes, and little inside an 8-GPU node."""
    for hardware, slower in (("a100_64gb", True), ("h200_141gb", False)):
        config, layout = plan(*REFERENCE, f"hardware={hardware}")
        inside, one = plan(*STAGE, "parallel.expert=2", f"hardware={hardware}")
        span = step_time(of(config, layout))
        stage = step_time(Plan(inside, one, VOCAB, assumptions=Assumptions()))
        assert (span.step > (1 + BAND) * stage.step) == slower
        assert (sum(span.layer.exchange) > 2 * sum(stage.layer.exchange)) == slower


@settings(deadline=None, max_examples=30)
@given(sequence=st.sampled_from([256, 1024, 4096, 16384]), imbalance=st.floats(1, 3))
def test_a_step_is_never_faster_than_its_work(sequence: int, imbalance: float) -> None:
    config, layout = plan(*REFERENCE)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence=sequence))
    time = step_time(Plan(config, layout, VOCAB, assumptions=Assumptions(imbalance=imbalance)))
    assert time.mfu is not None and 0 < time.mfu < 1
    even = step_time(of(config, layout))
    assert time.step >= even.step * (1 - 1e-9)
    assert time.tokens_per_second == pytest.approx(time.sequences_per_second * sequence)


def test_traffic_of_a_stage_repeats_what_is_recomputed() -> None:
    plain, again = (
        step_traffic(of(*plan(*STAGE, "parallel.expert=2", f"recompute.layers={layers}")), 1)
        for layers in ("none", "all")
    )
    by_name = {one.name: one for one in plain}
    # Of a layer: (forward, backward) calls; recomputation adds a forward pass.
    calls = {
        "tensor parallel, gather": (1, 2),
        "tensor parallel, scatter": (1, 1),
        "auxiliary loss, all-reduce": (1, 0),
        "experts, counts": (1, 0),
        "experts, rows out": (1, 1),
        "experts, probabilities": (1, 1),
        "experts, rows back": (1, 1),
    }
    for one in again:
        before = by_name.pop(one.name)
        if one.name in calls:
            ahead, back = calls.pop(one.name)
            assert before.calls == 32 * 4 * (ahead + back)
            assert one.calls == 32 * 4 * (2 * ahead + back)
            assert one.intra_bytes / one.calls == pytest.approx(before.intra_bytes / before.calls)
        else:
            assert one == before
    assert not calls and not by_name
    assert not any("gradients" in one.name and one.kind != "tp" for one in plain)


@pytest.mark.parametrize("words", [
    [*STAGE, "parallel.expert=2", "recompute.layers=none"],
    [*STAGE, "parallel.expert=2", "recompute.layers=none", "parallel.dispatcher=allgather"],
    [*STAGE, "parallel.expert=1", "parallel.expert_tensor=2", "recompute.layers=none"],
    [*REFERENCE, "recompute.layers=none"],
])  # fmt: skip
def test_the_traffic_reports_seconds_are_the_step_times(words: list[str]) -> None:
    config, layout = plan(*words)
    z = shapes(config, layout, VOCAB, Assumptions())
    layer, count = layer_traffic(config, layout, z), of(config, layout).microbatches
    ends = end_times(of(config, layout))
    parts = {"embedding": embedding_parts(config, z), "head": head_parts(config, z)}
    for stage in range(layout.pipeline):
        traffic = step_traffic(of(config, layout), stage)
        inner = [one for one in traffic if one.kind != "pp" and "gradients" not in one.name
                 and "weights" not in one.name]  # fmt: skip
        slots = count + layout.pipeline - 1 if layout.span else count
        tensor = layer.tensor_forward.seconds + layer.tensor_backward.seconds
        expert = layer.expert_forward.seconds + layer.expert_backward.seconds
        wanted = 4 * (count * tensor + slots * expert)
        for name, place in (("embedding", 0), ("head", layout.pipeline - 1)):
            if stage == place:
                wanted += count * (sum(ends[name]) - sum(passes_of(parts[name])))
        assert sum(one.seconds for one in inner) == pytest.approx(wanted)


def test_backward_moves_the_weights_gradients() -> None:
    """Bytes of an infinitely fast device whose only limit is memory, counted tensor by tensor."""
    fast = {"fp32": 1e12, "bf16": 1e12}
    for overrides, kind, moved in (
        # fp32 on the host: W for inputs' gradients; dW written; dW and buffer read, buffer written
        (["dtype=fp32"], "cpu", 4 + 4 + 4 + 4 + 4),
        # bf16 with fp32 buffers, fused: W; the buffer read and written
        (["dtype=bf16", "optim.precision_aware=false", "optim.grad_dtype=fp32"],
         "accelerator", 2 + 4 + 4),
    ):  # fmt: skip
        config, layout = plan(
            "experiment=twin", "parallel=single", "device=cpu", *overrides, world=1
        )
        hardware = HardwareConfig(
            kind=kind, peak_tflops=fast, memory_gbps=1.0, memory_efficiency=1.0
        )
        config = dataclasses.replace(config, hardware=hardware)
        z = shapes(config, layout, VOCAB, assumptions_of(config))
        (experts,) = [part for part in expert_parts(config, z) if part.name == "experts"]
        weights = config.model.experts * 3 * config.model.hidden * config.model.expert_hidden
        assert experts.seconds == pytest.approx(weights * z.b / 1e9)
        assert experts.backward_seconds == pytest.approx(weights * moved / 1e9)


def test_bytes_of_the_optimizers_phase() -> None:
    config, _ = plan("experiment=twin", "parallel=single", "device=cpu", world=1)
    hardware = HardwareConfig(memory_gbps=1.0, memory_efficiency=1.0)
    config = dataclasses.replace(config, hardware=hardware)
    # fp32: zeroed; read for the norm; scaled; read by Adam; moments and weights both ways.
    assert optimizer_seconds(config, 1000, 1000) == pytest.approx(1e-6 * (4 + 4 + 8 + 4 + 16 + 8))
    assert optimizer_seconds(config, 1000, 0) == pytest.approx(1e-6 * 4)


def test_gradients_of_replicas() -> None:
    config, layout = plan(*STAGE, "parallel=tp2_ep8")
    held = rank_parameters(config.model, layout, 0, VOCAB)
    sent = {name: one for name, _, one in gradient_traffic(config, layout, held)}
    moved = sent["dense gradients, reduce-scatter"]
    assert moved.intra + moved.inter == pytest.approx(held.dense * 2 * 3 / 4)
    assert sent["expert gradients, reduce-scatter"].seconds == 0.0


def test_ranking_puts_what_fits_first_and_then_the_fastest() -> None:
    config, layout = plan(*STAGE, "parallel.expert=2")
    free = dataclasses.replace(config.parallel, tensor=None, pipeline=None, expert=None)
    options = legal_layouts(dataclasses.replace(config, parallel=free), 8)
    order = ranked(config, options)
    assert sorted(map(str, order)) == sorted(map(str, options))
    from moe_train.parallel.sizes import with_layout
    from moe_train.planner.memory.fit import fits

    taken = assumptions_of(config)
    fit = [fits(Plan(with_layout(config, one), one, VOCAB, assumptions=taken)) for one in order]
    assert fit == sorted(fit, reverse=True) and any(fit) and not all(fit)
    speed = [
        step_time(Plan(with_layout(config, one), one, VOCAB, assumptions=taken)).tokens_per_second
        for one, good in zip(order, fit, strict=True)
        if good
    ]
    assert speed == sorted(speed, reverse=True)


@pytest.mark.parametrize("world", [32, 256, 4096, 16384])
def test_automatic_layouts_of_large_worlds_fit(world: int) -> None:
    from moe_train.planner.memory.fit import memory_fault

    overrides = ["experiment=moe_30b_8x64gb", "parallel=auto", "parallel.placement=stage"]
    run = resolve_run(overrides, world)
    config, layout = run.config, run.layout
    assert layout.world == world
    assert memory_fault(Plan(config, layout, VOCAB, assumptions=assumptions_of(config))) is None


def test_softmax_of_small_heads() -> None:
    """With a rate of exponentials attention takes longer the smaller its heads are."""
    config, layout = plan("experiment=twin", "parallel=single", "device=cpu", world=1)
    z = shapes(config, layout, VOCAB, Assumptions())
    pairs = config.model.heads * config.data.sequence * (config.data.sequence + 1) / 2

    def scores(**changes: float) -> tuple[float, float]:
        hardware = dataclasses.replace(config.hardware, **changes)  # type: ignore[arg-type]
        parts = dense_parts(dataclasses.replace(config, hardware=hardware), z)
        (part,) = [part for part in parts if part.name == "scores"]
        return part.seconds, part.backward_seconds

    hidden, slower = scores(attention_exp_gops=0.0), scores(attention_exp_gops=2.0)
    assert slower[0] - hidden[0] == pytest.approx(pairs / 2e9)
    assert slower[1] == pytest.approx(2.5 * slower[0])


def test_calls_of_a_spanning_step() -> None:
    """As torch's profiler counts them: 8 micro-batches, 2 stages of 2 layers, 5 calls a layer."""
    overrides = ["experiment=twin", "parallel=single", "device=cpu", "recompute=none",
             "parallel.pipeline=2", "parallel.expert=2", "parallel.placement=span",
             "model.layers=4"]  # fmt: skip
    config, layout = plan(*overrides, world=2)
    z = shapes(config, layout, VOCAB, assumptions_of(config))
    traffic = step_traffic(of(config, layout), 0)
    assert sum(one.calls for one in traffic if one.kind == "ep") == 9 * 2 * 5
    rows = {one.name: one for one in traffic}["experts, results"]
    assert rows.intra_bytes == pytest.approx(2 * 8 * 2 * z.N * z.K * z.H * z.b / 2)


def test_gradients_hide_on_spare_cores_alone() -> None:
    """On the host a collective needs a core; without one to spare it is waited for."""
    overrides = ["experiment=twin", "parallel=single", "device=cpu", "hardware.cores=3"]
    config, layout = plan(*overrides, world=2)
    assert config.parallel.overlap_grad_reduce and layout.data == 2
    spare = step_time(of(config, layout))
    full = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, cores=2))
    held = rank_parameters(config.model, layout, 0, VOCAB)
    reduce = sum(sent.seconds for _, _, sent in gradient_traffic(config, layout, held))
    assert step_time(of(full, layout)).gradients == pytest.approx(reduce)
    assert spare.gradients < reduce


@pytest.mark.parametrize("words", [
    ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4", "parallel.placement=span"],
])  # fmt: skip
def test_ranks_that_share_cores(words: list[str]) -> None:
    """Between the work spread over the cores and the step that every rank's own core makes."""
    shared = ["experiment=twin", "parallel=single", "device=cpu", "recompute=none", *words]
    config, layout = plan(*shared, world=4)

    def pipeline(**changes: float) -> float:
        hardware = dataclasses.replace(config.hardware, **changes)  # type: ignore[arg-type]
        one = dataclasses.replace(config, hardware=hardware)
        return step_time(Plan(one, layout, VOCAB, assumptions=assumptions_of(one))).pipeline

    own = pipeline(cores=0)
    assert pipeline(cores=4) == own
    # Without links to wait for, all that the ranks compute, spread over the cores, is the least.
    free = {"latency_us": 0.0, "message_us": 0.0, "intra_node_gbps": 1e12, "inter_node_gbps": 1e12}
    for cores in (1, 2, 3):
        work = pipeline(cores=1, collective_work=1.0, **free) * 0.9 / cores
        idle, some, all_ = (pipeline(cores=cores, collective_work=x) for x in (0.0, 0.4, 1.0))
        assert max(own, work) < idle < some < all_ <= 4 / cores * own


def test_times_do_not_depend_on_the_memory_model() -> None:
    """`parallel=auto` ranks by time: a memory term cannot change the layout among fitting ones."""
    cost = Path(compute.__file__).parent
    assert len(list(cost.glob("*.py"))) > 5
    readers = [path.name for path in cost.glob("*.py") if "planner.memory" in
               path.read_text().partition("from __future__")[2]]  # fmt: skip
    assert not readers

"""Attention over parts of a sequence: the ring's messages, kernels and merges, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from moe_train.planner.cost.calls import ring_calls
from moe_train.planner.cost.communication import Traffic, step_traffic
from moe_train.planner.cost.compute import dense_parts
from moe_train.planner.cost.constants import constants
from moe_train.planner.cost.launches import ATTENTION, layer_launches
from moe_train.planner.cost.passes import layer_time
from moe_train.planner.cost.timing import step_time
from moe_train.planner.plan import Plan
from moe_train.planner.resolution import resolve_run
from moe_train.planner.schedule.work import LayerPieces, total
from moe_train.planner.search.terms import NAMES, placed, step_terms

LAYERS, KV_HEADS, WIDTH, SEQUENCE, GLOBAL, WORLD = 8, 4, 128, 16384, 32, 32
WORDS = [
    f"model.layers={LAYERS}", "model.hidden=2048", "model.heads=32", f"model.kv_heads={KV_HEADS}",
    f"model.head_dim={WIDTH}", "model.experts=64", "model.experts_per_token=8",
    "model.expert_hidden=768", "model.vocab=32000", "hardware=h100_80gb", "dtype=bf16",
    f"data.sequence={SEQUENCE}", f"batch.global={GLOBAL}", "parallel.placement=stage",
    "parallel.auto=false", "parallel.expert=8", "recompute=none", "optim.distributed=true",
]  # fmt: skip


@cache
def plan(*words: str, context: int = 4) -> Plan:
    return Plan.of(resolve_run([*WORDS, f"parallel.context={context}", *words], WORLD))


def linked(one: Plan, factor: float) -> Plan:
    """`one` on links that are so many times as fast."""
    hardware = one.config.hardware
    faster = replace(
        hardware,
        intra_node_gbps=hardware.intra_node_gbps * factor,
        inter_node_gbps=hardware.inter_node_gbps * factor,
    )
    return one.under(replace(one.config, hardware=faster))


def ring(one: Plan) -> list[Traffic]:
    return [row for row in step_traffic(one, 0) if row.kind == "cp"]


def sections(context: int) -> list[tuple[int, int]]:
    """Halves of the queries and of the keys in each further step of every rank, as
    TransformerEngine's causal sections have them: the lower triangle, then the upper one.
    """
    return [
        (2, 1) if step <= rank else (1, 2) for rank in range(context) for step in range(1, context)
    ]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("context", [2, 4, 8])
@pytest.mark.parametrize("again", [False, True])
def test_messages_are_those_of_the_loop(context: int, tensor: int, again: bool) -> None:
    each = SEQUENCE // context * KV_HEADS // tensor * WIDTH * 2
    sent = [2 * each for step in range(context) if step < context - 1]
    sent *= 2 if again else 1
    for step in range(context):
        sent.append((2 if step in (0, context - 1) else 4) * each)
    words = ["recompute.layers=none", "recompute.modules=[core_attn]"] if again else []
    one = plan(f"parallel.tensor={tensor}", *words, context=context)
    passes = LAYERS * GLOBAL * context * tensor // WORLD
    assert sum(row.calls for row in ring(one)) == passes * len(sent)
    moved = sum(row.intra_bytes + row.inter_bytes for row in ring(one))
    assert moved == pytest.approx(passes * sum(sent))
    assert {row.size for row in ring(one)} == {context}


def test_recomputed_layers_send_keys_and_values_again() -> None:
    without, whole = (plan(f"recompute.layers={layers}") for layers in ("none", "all"))
    more = sum(row.calls for row in ring(whole)) - sum(row.calls for row in ring(without))
    assert more == LAYERS * whole.microbatches * 3


@pytest.mark.parametrize(("tensor", "context", "share"), [(2, 4, 0.0), (2, 8, 1 / 4), (8, 2, 1.0)])
def test_messages_cross_where_neighbours_are_on_other_nodes(
    tensor: int, context: int, share: float
) -> None:
    """Nodes have 8 devices, and tensor-parallel ranks are neighbours."""
    words = f"parallel.tensor={tensor}", "model.kv_heads=8"
    one = plan(*words, context=context)
    inter, intra = (sum(getattr(row, f"{way}_bytes") for row in ring(one))
                    for way in ("inter", "intra"))  # fmt: skip
    assert inter / (inter + intra) == pytest.approx(share)
    where = "inside a node" if share == 0 else "between nodes"
    assert placed(one, NAMES["ring"]) == f"{NAMES['ring']} {where}"


@pytest.mark.parametrize("context", [2, 4, 8])
def test_every_rank_scores_as_many_pairs(context: int) -> None:
    """Chunks r and 2 c - 1 - r of a sequence, each position with those up to itself."""
    one = plan(context=context)
    size = SEQUENCE // (2 * context)
    (scores,) = [part for part in dense_parts(one.config, one.shapes) if part.name == "scores"]
    for rank in range(context):
        chunks = (rank, 2 * context - 1 - rank)
        pairs = sum(i + 1 for k in chunks for i in range(k * size, (k + 1) * size))
        assert scores.flops == pytest.approx(2 * 2 * pairs * one.shapes.Q)


@pytest.mark.parametrize("context", [2, 4, 8])
def test_merges_move_what_the_steps_give(context: int) -> None:
    one = plan(context=context)
    z = one.shapes
    (merges,) = [part for part in dense_parts(one.config, z) if part.name.startswith("merges")]
    hardware = one.config.hardware
    rate = hardware.memory_gbps * hardware.memory_efficiency * 1e9
    rate /= constants(hardware).elementwise
    query, key, sums = (
        SEQUENCE // context * n for n in (32 * WIDTH * 2, KV_HEADS * WIDTH * 2, 128)
    )
    # A copy reads and writes; a sum reads both and writes one.
    ahead = 2 * (2 * key + query + sums)
    back = 2 * (2 * key + query + 2 * key)
    for queries, keys in sections(context):
        # Log-sum: both read, one written; output: both, with both of its log-sums.
        ahead += (3 * query + 5 * sums) * queries / 2 / context
        back += (3 * query * queries / 2 + 3 * 2 * key * keys / 2) / context
    assert merges.seconds * rate == pytest.approx(ahead)
    assert merges.backward_seconds * rate == pytest.approx(back)


def test_launches_grow_with_the_steps() -> None:
    counts = []
    for context in (1, 2, 4, 8):
        one = plan(context=context)
        counts.append(layer_launches(one.config, one.shapes)["attention"])
    assert counts[0] == ATTENTION
    for way in (0, 1):
        first, second, third = (b[way] - a[way] for a, b in zip(counts, counts[1:], strict=False))
        assert third == 2 * second and first > second / 2 > 0


def test_communication_adds_to_the_time_and_bandwidth_takes_from_it() -> None:
    one = plan()
    layers = [layer_time(linked(one, factor)) for factor in (0.01, 0.1, 1.0, 10.0, 1e9)]
    for way in (0, 1):
        left = [layer.ring[way] for layer in layers]
        assert left == sorted(left, reverse=True) and left[-1] < left[0] / 10
    times = [step_time(linked(one, factor)).step for factor in (0.01, 0.1, 1.0, 10.0)]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4
    layer = layer_time(one)
    assert layer.forward() > replace(layer, ring=type(layer.ring)(0.0, 0.0)).forward()


def test_slow_links_leave_what_the_steps_do_not_hide() -> None:
    """Where messages are far longer than steps of attention, all but those steps is waited for."""
    one = linked(plan(), 1e-3)
    hardware = one.config.hardware
    scores = next(part for part in dense_parts(one.config, one.shapes) if part.name == "scores")
    sent = sum(
        call.forward * call.sent.seconds for call in ring_calls(one.config, one.layout, one.shapes)
    )
    hidden = 3 * scores.seconds / 4 * (1 - hardware.overlap_share) ** 2
    assert layer_time(one).ring.forward == pytest.approx(sent - hidden)


def test_short_sequences_wait_for_a_larger_share() -> None:
    """Attention grows with the square of a sequence, what it sends with the sequence."""
    shares = []
    for sequence in (4096, 131072):
        words = "hardware.devices_per_node=2", f"data.sequence={sequence}", "batch.micro=4"
        layer = layer_time(plan(*words))
        shares.append(sum(layer.ring) / layer.forward())
    assert shares[0] > shares[1] > 0


@pytest.mark.parametrize("again", [False, True])
def test_terms_and_schedule_have_the_same_seconds(again: bool) -> None:
    one = plan(f"recompute.layers={'all' if again else 'none'}")
    time, layer = step_time(one), layer_time(one)
    terms = step_terms(one, time)
    assert sum(terms.values()) == pytest.approx(time.step)
    passes = one.microbatches * LAYERS
    assert terms[NAMES["ring"]] == pytest.approx(passes * sum(layer.ring)) and sum(layer.ring) > 0
    pieces = LayerPieces(one, layer)
    ahead, back = pieces.whole(1), pieces.whole_back(1, recomputed=again)
    assert total(ahead) == pytest.approx(layer.forward())
    assert total(back) == pytest.approx(layer.backward(recomputed=again))
    moved = sum(piece.bytes for piece in (*ahead, *back) if piece.op == "ring")
    rows = sum(row.intra_bytes + row.inter_bytes for row in ring(one))
    assert passes * moved == pytest.approx(rows)


def test_whole_sequences_have_no_ring() -> None:
    one = plan(context=1)
    names = {part.name for part in dense_parts(one.config, one.shapes)}
    assert not ring(one) and not any("ring" in name for name in names)
    layer = layer_time(one)
    assert layer.ring == (0.0, 0.0)
    assert "ring" not in {piece.op for piece in LayerPieces(one, layer).whole(1)}

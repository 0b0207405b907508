"""The experts of all stages in one module: what it computes, what it skips, where it is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moe_train.testing.world import run_world
from tests.support.engines import gradient_shards, micro_batches, open_engine
from tests.support.shards import matrices

SMALL = [
    *("experiment=twin", "parallel=single", "recompute=none", "model.layers=4", "optim.clip=0"),
    *("model.hidden=64", "model.heads=8", "model.head_dim=8", "model.experts=8"),
    *("model.expert_hidden=32", "data.sequence=32", "batch.global=4"),
    *("parallel.placement=span", "parallel.pipeline=2", "parallel.expert=2"),
]
TP2 = ["parallel.tensor=2", "parallel.expert=4"]
OVERLAP = "parallel.overlap_expert_comm=true"
ON_INPUT = [
    *("megatron.transformer.moe_apply_probs_on_input=true", "model.experts_per_token=1"),
    "model.router.pre_softmax=true",
]
SLOTS, LAYERS = 5, 2
"""Forward slots of 4 micro-batches through 2 stages, and layers of a stage."""


@contextmanager
def staged(on: bool) -> Iterator[None]:
    """As with kernels that cannot be replayed: a module a stage, each with its own graph."""
    from moe_train.model.span import experts

    with ExitStack() as stack:
        if on:
            stack.enter_context(mock.patch.object(experts, "replays", lambda builder: False))
        yield


def one_step(rank: int, world: int, overrides: list[str], apart: bool) -> tuple[Any, ...]:
    from moe_train.train.step import train_step

    with staged(apart):
        engine = open_engine(rank, world, [*SMALL, *overrides])
    names = [name for name, _ in engine.chunks[0].named_parameters() if "linear_fc1" in name]
    tokens = np.random.default_rng(5).integers(0, 128, (4, 33))
    result = train_step(engine, micro_batches(engine, tokens), 1)
    results = {(s.key, s.offset): s.data for s in gradient_shards(engine)}
    return result.loss.hex(), results, matrices(engine.chunks), names


@pytest.mark.world
@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        ([*TP2, OVERLAP, "dtype=bf16"], 4),
        pytest.param([*TP2, "recompute.modules=[moe]"], 4, marks=pytest.mark.full),
        pytest.param(ON_INPUT, 2, marks=pytest.mark.full),
    ],
    ids=["kept", "recomputed", "probabilities on the input"],
)
def test_merged_and_staged_experts_are_one_model(overrides: list[str], world: int) -> None:
    """Losses and gradients bitwise, and checkpoints with the same keys, shapes and offsets."""
    merged = run_world(one_step, world, overrides, False)
    apart = run_world(one_step, world, overrides, True)
    for (loss, grads, places, names), (other, others, elsewhere, each) in zip(
        merged, apart, strict=True
    ):
        assert loss == other and places == elsewhere
        assert sum("by_stage" in name for name in each) == 2 * LAYERS
        assert sum("merged" in name for name in names) == LAYERS
        # Not by shard: the merged module's are joined by layer.
        assert cells(grads) == cells(others)


def cells(shards: dict[Any, np.ndarray[Any, Any]]) -> dict[Any, bytes]:
    """Every matrix by its place in the global tensor."""
    return {(key, offset): data.tobytes() for (key, offset), data in shards.items()}


class Copies:
    """Copies to the host, and what else would make the host wait for a device."""

    def __init__(self) -> None:
        self.copies: list[str] = []
        self.waits: list[str] = []

    @contextmanager
    def counted(self, span: Any) -> Iterator[None]:
        from torch.utils._python_dispatch import TorchDispatchMode

        from moe_train.model.span import dispatcher

        copies, waits = self.copies, self.waits
        to_host, forward, backward = dispatcher.to_host, span.forward, span.backward
        counts, current = span.counts, threading.local()  # Slots that overlap have threads.

        class Waits(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func is torch.ops.aten._local_scalar_dense.default and hasattr(current, "place"):
                    waits.append(current.place)
                return func(*args, **(kwargs or {}))

        def copied(tensor: torch.Tensor) -> Any:
            copies.append(current.place)
            return to_host(tensor)

        def inside(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                before, current.place = getattr(current, "place", None), name
                try:
                    with Waits():
                        return plain(*args)
                finally:
                    if before is None:
                        del current.place
                    else:
                        current.place = before

            return call

        span.forward, span.counts = inside("forward", forward), inside("forward", counts)
        span.backward = inside("backward", backward)
        with mock.patch.object(dispatcher, "to_host", copied):
            yield


def count_copies(rank: int, world: int, overrides: list[str]) -> tuple[int, int, list[str]]:
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, [*SMALL, *overrides])
    copies, schedule = Copies(), engine.forward_backward
    tokens = np.random.default_rng(5).integers(0, 128, (4, 33))
    with copies.counted(schedule.dispatcher):  # type: ignore[attr-defined]
        train_step(engine, micro_batches(engine, tokens), 1)
    return copies.copies.count("forward"), copies.copies.count("backward"), copies.waits


@pytest.mark.world
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.router.capacity_factor=1.0", "recompute.layers=all"],
        pytest.param([], marks=pytest.mark.full),
        pytest.param(["recompute.layers=all", OVERLAP], marks=pytest.mark.full),
    ],
    ids=["capacity, recomputed", "dropless", "recomputed, overlapped"],
)
def test_one_copy_to_the_host_a_forward_slot_and_layer(overrides: list[str]) -> None:
    for forward, backward, waits in run_world(count_copies, 2, overrides):
        assert forward == SLOTS * LAYERS and backward == 0
        assert waits == []


def built(dtype: torch.dtype, parts: int, per_part: int) -> Any:
    """Grouped experts of several parts, as a layer of span has them."""
    from moe_train.backend.torch_kernels.products import grouped_linear

    torch.manual_seed(1)
    hidden, width = 16, 8

    class Linear(torch.nn.Module):
        tape: Any = None

        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            weight = torch.randn(parts * per_part, rows, columns) * 0.3
            self.weight = torch.nn.Parameter(weight.to(dtype))
            self.products = 0

        def forward(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
            if self.tape is not None:
                product: torch.Tensor = self.tape.product(self.weight, x, rows)
                return product
            return grouped_linear(x, self.weight, rows)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2 = Linear(2 * width, hidden), Linear(hidden, width)

        def forward(self, x: torch.Tensor, rows: Any, probs: torch.Tensor) -> Any:
            gate, up = self.linear_fc1(x, rows.tolist()).chunk(2, -1)
            activation = torch.nn.functional.silu(gate) * up * probs[:, None].to(dtype)
            return self.linear_fc2(activation, rows.tolist()), None

    return Experts()


ROWS = {
    "every expert": [3, 1, 2, 4, 2, 1],
    "some without": [0, 5, 0, 0, 1, 3],
    "a part without": [2, 3, 0, 0, 0, 1],
    "one expert": [0, 0, 0, 7, 0, 0],
    "none": [0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [False, True], ids=["replayed", "run again"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_replay_has_autograds_gradients(rows: list[int], again: bool, dtype: torch.dtype) -> None:
    """Recorded in two passes with other company each, gone backward together; zero rows too."""
    from moe_train.backend.torch_kernels.replay import backward, record

    parts, per_part = 3, 2
    experts, plain = (built(dtype, parts, per_part) for _ in range(2))
    rows_E, total = np.array(rows), sum(rows)
    x = torch.randn(total, 16).to(dtype).requires_grad_()
    probs = torch.rand(total).requires_grad_()
    output, _ = plain(x, rows_E, probs)
    upstream = torch.randn(total, 16).to(dtype)
    output.backward(upstream)

    by_part = rows_E.reshape(parts, per_part)
    inputs, results, start = [], [], 0
    for part, count in enumerate(by_part.sum(axis=1).tolist()):
        own = np.zeros_like(by_part)
        own[part] = by_part[part]
        end = start + count
        made, first = record(experts, x[start:end].detach(), own.ravel(), probs[start:end].detach())
        assert torch.equal(made, output[start:end]) and not made.requires_grad
        start = end
        if count:
            inputs.append(x[end - count : end].detach())
            results.append(first)
    result = None if again else torch.cat(results) if results else x.detach()
    grads = backward(experts, inputs, rows_E, probs.detach(), result, upstream, parts=parts)
    assert x.grad is not None and probs.grad is not None
    assert torch.equal(grads[0], x.grad) and torch.equal(grads[1], probs.grad)
    for ours, theirs in zip(experts.parameters(), plain.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad is None if not total else torch.equal(ours.grad, expected)
        idle = [expert for expert, count in enumerate(rows) if not count]
        assert not expected[idle].any(), "an expert without rows has no gradient"


def test_gradients_are_added_to_the_buffer_and_idle_parts_are_left_alone() -> None:
    from moe_train.backend.torch_kernels.replay import backward

    experts, plain = (built(torch.float32, 3, 2) for _ in range(2))
    rows = np.array(ROWS["a part without"])
    total = int(rows.sum())
    x, probs, upstream = torch.randn(total, 16), torch.rand(total), torch.randn(total, 16)
    plain(x, rows, probs)[0].backward(upstream)
    for weight in experts.parameters():
        weight.main_grad = torch.ones_like(weight)
        weight.main_grad[2:4] = float("nan")
        weight.grad_added_to_main_grad = False
    inputs = [x[:5], x[5:]]
    for _ in range(2):
        backward(experts, inputs, rows, probs, None, upstream, parts=3)
    for weight, other in zip(experts.parameters(), plain.parameters(), strict=True):
        assert weight.grad is None and weight.grad_added_to_main_grad
        assert weight.main_grad[2:4].isnan().all(), "a part without rows was touched"
        torch.testing.assert_close(weight.main_grad[:2], 1 + 2 * other.grad[:2])
        torch.testing.assert_close(weight.main_grad[4:], 1 + 2 * other.grad[4:])


def test_no_product_of_the_forward_pass_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.backend.torch_kernels import replay

    made = []
    plain = replay.output
    monkeypatch.setattr(replay, "output", lambda *args: made.append(1) or plain(*args))
    experts, rows = built(torch.float32, 1, 2), np.array([3, 2])
    x, probs, upstream = torch.randn(5, 16), torch.rand(5), torch.randn(5, 16)
    _, result = replay.record(experts, x, rows, probs)
    assert len(made) == 2
    replay.backward(experts, [x], rows, probs, result, upstream, parts=1)
    assert len(made) == 2
    replay.backward(experts, [x], rows, probs, None, upstream, parts=1)
    assert len(made) == 4


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("counts", [[64, 0, 128, 0], [0, 0, 0, 0]], ids=["some", "none"])
def test_transformer_engine_takes_experts_without_rows(counts: list[int]) -> None:
    """Its grouped linear with fused weight gradients: zeros for such experts, nothing added."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("transformer_engine.pytorch")
    from moe_train.gpu_check.tasks.te import zero_rows

    result = zero_rows(256, 512, counts)
    assert max(result.values()) < 0.02, result

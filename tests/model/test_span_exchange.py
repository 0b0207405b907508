"""The dispatcher's rows, and which failures mean a lost peer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import HungError
from moe_train.model.span import dispatcher
from moe_train.model.span.dispatcher import FORWARD, PROBS, CrossStageDispatcher
from moe_train.model.span.packing import pack, unpack, width

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(st.integers(1, 9000), st.sampled_from(DTYPES))
def test_every_peers_rows_are_aligned(hidden: int, dtype: torch.dtype) -> None:
    """NCCL moves 16 bytes at a time only from and to addresses that are multiples of 16."""
    probs = torch.float64 if dtype == torch.float64 else PROBS
    columns = width(hidden, dtype, probs)
    assert columns * dtype.itemsize % 16 == 0
    wasted = columns * dtype.itemsize - hidden * dtype.itemsize - probs.itemsize
    assert 0 <= wasted < 16


def test_a_row_of_the_30b() -> None:
    assert width(4608, torch.bfloat16, PROBS) * 2 == 9232


@given(st.integers(0, 5), st.integers(1, 70), st.sampled_from(DTYPES[:3]))
def test_rows_come_out_as_they_went_in(rows: int, hidden: int, dtype: torch.dtype) -> None:
    tokens, probs = torch.randn(rows, hidden).to(dtype), torch.rand(rows)
    packed = pack(tokens, probs)
    assert packed.shape == (rows, width(hidden, dtype, PROBS)) and packed.is_contiguous()
    back, weights = unpack(packed, hidden, PROBS)
    assert torch.equal(back, tokens) and torch.equal(weights, probs)
    assert back.stride() == (hidden, 1) and back.is_contiguous()


def all_to_all(failure: Exception, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-to-all of local layer 3 that fails as it starts, is awaited, or overlapped."""

    def fail(place: str) -> None:
        if place == where:
            raise failure

    def start(*_: Any, **__: Any) -> Any:
        fail("start")
        return SimpleNamespace(wait=lambda: fail("wait"))

    stand_in = SimpleNamespace(all_to_all_single=start, get_rank=lambda: 5)
    monkeypatch.setattr(dispatcher, "dist", stand_in)
    group: Any = SimpleNamespace(size=lambda: 2)
    span = CrossStageDispatcher(
        group, tensor=1, stages=2, hidden=4, dtype=torch.float32, device=torch.device("cpu"),
        recompute=False,
    )  # fmt: skip
    span.begin(7, [0], backward=False, save=True)
    data = torch.zeros(2, 1)
    span._all_to_all(
        FORWARD, 3, data.clone(), data, [1, 1], [1, 1], overlapped=lambda: fail("overlapped")
    )


@pytest.mark.parametrize("where", ["start", "wait"])
@pytest.mark.parametrize(
    "failure",
    [
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistNetworkError("the connection was closed"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"),
    ],
)
def test_a_lost_peer_is_named_with_tick_and_layer(
    failure: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HungError) as raised:
        all_to_all(failure, where, monkeypatch)
    output = str(raised.value)
    for word in ("rank 5", "local layer 3", "tick 7, forward slot"):
        assert word in output, output
    assert raised.value.__cause__ is failure


@pytest.mark.parametrize("where", ["start", "wait", "overlapped"])
@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("shape '[3]' is invalid for input of size 4"),
    ],
)
def test_other_failures_pass_as_themselves(
    failure: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(failure)) as raised:
        all_to_all(failure, where, monkeypatch)
    assert raised.value is failure

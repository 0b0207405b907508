"""An update in parts: the same bits as the whole at once, and little memory beside the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_train.backend.torch_kernels.adam import ALIGNED, SCRATCH_BYTES, TorchAdam
from moe_train.measure.dryrun.tracker import MemoryTracker

FP32, BF16 = torch.float32, torch.bfloat16
STEP = 4
"""Bytes of the step count."""


def gradient_name(adam: TorchAdam) -> str:
    return "decoupled_grad" if adam.use_decoupled_grad else "grad"


def whole(adam: TorchAdam, step: int) -> None:
    """The update by its definition: the kernel on fp32 copies of everything at once."""
    [group] = adam.param_groups
    group["step"] += 1
    params = [p for p in group["params"] if getattr(p, gradient_name(adam), None) is not None]
    if not params:
        return
    for param in params:
        if not adam.state[param]:
            adam.initialize_state(param)
    master = "master_param" if adam.master_weights else None
    sources = [
        [adam.state[p][master] if master else p.detach() for p in params],
        [getattr(p, gradient_name(adam)) for p in params],
        [adam.state[p]["exp_avg"] for p in params],
        [adam.state[p]["exp_avg_sq"] for p in params],
    ]
    copies = [[tensor.float().clone() for tensor in tensors] for tensors in sources]
    kernel = torch._fused_adamw_ if adam.adam_w_mode else torch._fused_adam_
    kernel(
        *copies,
        [],
        [torch.tensor(float(group["step"])) for _ in params],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    with torch.no_grad():
        for index in (0, 2, 3):
            for target, value in zip(sources[index], copies[index], strict=True):
                target.copy_(value)
        for param, value in zip(params, copies[0], strict=True):
            param.copy_(value)


def build(sizes: list[int], options: dict[str, Any], dtype: torch.dtype, seed: int) -> TorchAdam:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    return TorchAdam(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)


def set_gradients(adam: TorchAdam, dtype: torch.dtype, seed: int, without: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index, param in enumerate(adam.param_groups[0]["params"]):
        gradient = torch.randn(param.shape, generator=generator).to(dtype)
        setattr(param, gradient_name(adam), None if index == without else gradient)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 15, 63, 64, 65, 129, 1000]), min_size=1, max_size=5),
    scratch=st.sampled_from([1, 4096, 10_000, 1 << 20]),
    moments=st.tuples(st.sampled_from([FP32, BF16]), st.sampled_from([FP32, BF16])),
    precision=st.sampled_from([(FP32, False, FP32), (BF16, True, BF16), (BF16, True, FP32)]),
    decoupled=st.booleans(),
    without=st.integers(-1, 4),
)
def test_parts_change_no_bit(
    sizes: list[int],
    scratch: int,
    moments: tuple[torch.dtype, torch.dtype],
    precision: tuple[torch.dtype, bool, torch.dtype],
    decoupled: bool,
    without: int,
) -> None:
    dtype, master, grads = precision
    options = {
        "exp_avg_dtype": moments[0],
        "exp_avg_sq_dtype": moments[1],
        "master_weights": master,
        "use_decoupled_grad": master,
        "adam_w_mode": decoupled,
    }
    ours, plain = (build(sizes, options, dtype, seed=3) for _ in range(2))
    ours.scratch_bytes = scratch
    for step in range(3):
        for adam in (ours, plain):
            set_gradients(adam, grads, step, without)
        ours.step()
        whole(plain, step)
    for mine, other in zip(
        ours.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(mine, other)
        assert ours.state[mine].keys() == plain.state[other].keys()
        for name, value in ours.state[mine].items():
            assert torch.equal(value, plain.state[other][name]), name
            assert value.dtype == plain.state[other][name].dtype


def test_a_part_off_the_vectors_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why parts are aligned: the kernel's last elements are rounded otherwise."""
    options = {"exp_avg_dtype": BF16}
    ours, plain = (build([4096 + 5], options, FP32, seed=1) for _ in range(2))
    assert ALIGNED % 16 == 0
    monkeypatch.setattr("moe_train.backend.torch_kernels.adam.ALIGNED", 5)
    ours.scratch_bytes = 5
    for step in range(3):
        for adam in (ours, plain):
            set_gradients(adam, FP32, step, -1)
        ours.step()
        whole(plain, step)
    [mine], [other] = ours.param_groups[0]["params"], plain.param_groups[0]["params"]
    assert not torch.equal(ours.state[mine]["exp_avg_sq"], plain.state[other]["exp_avg_sq"])


@pytest.mark.parametrize("moments", [BF16, FP32])
def test_the_update_of_the_30b_takes_little_more(moments: torch.dtype) -> None:
    """A rank of the 30B, precision-aware: 3.8 B parameters, stacked experts among them."""
    layer = [(32, 4096, 4608), (32, 4608, 2048), (3072, 4608), (4608, 1024), (4608,), (64, 4608)]
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(s, dtype=BF16)) for s in layer * 4]
        adam = TorchAdam(
            params,
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
            master_weights=True,
            use_decoupled_grad=True,
        )
        for param in params:
            param.decoupled_grad = torch.empty_like(param)  # type: ignore[attr-defined]
        assert sum(param.numel() for param in params) > 3.6e9
        with MemoryTracker() as tracker:
            tracker.own(params, "weights")
            tracker.own([param.decoupled_grad for param in params], "gradients")  # type: ignore[attr-defined]
            for _ in range(2):
                # The first update also makes the state, and nothing on the way to it.
                tracker.begin()
                adam.step()
                assert 0 < tracker.peak().bytes - tracker.live <= SCRATCH_BYTES + STEP
            assert tracker.live > 3.6e9 * (8 if moments == BF16 else 12)


def test_state_in_fp32_is_updated_in_place() -> None:
    adam = build([100_000], {}, FP32, seed=0)
    [param] = adam.param_groups[0]["params"]
    for step in range(2):
        set_gradients(adam, FP32, step, -1)
        if step:
            break
        adam.step()
    with MemoryTracker() as tracker:
        tracker.own([param, param.grad, *adam.state[param].values()], "optimizer")
        before = tracker.live
        tracker.begin()
        adam.step()
        assert tracker.peak().bytes - before == STEP

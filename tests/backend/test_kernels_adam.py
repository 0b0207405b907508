"""TorchAdam against torch's AdamW, and what torch's has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.backend.torch_kernels.adam import TorchAdam

SHAPES = ((7, 5), (11,), (3, 4, 5))


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int, name: str = "grad") -> None:
    torch.manual_seed(100 + step)
    for param in params:
        setattr(param, name, torch.randn(param.shape).to(param.dtype))


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "weight_decay": 0.1, "lr": 1e-2},
        {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.9)},
    ]


@pytest.mark.parametrize("decoupled", [True, False])
def test_ten_steps_as_torch(decoupled: bool) -> None:
    """Both modes, two groups; the weight decay, betas and rate of each are its own."""
    ours, theirs = parameters(), parameters()
    adam = TorchAdam(groups(ours), eps=1e-6, betas=(0.9, 0.95), adam_w_mode=decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    oracle = kind(groups(theirs), eps=1e-6, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(10):
        for group in (*adam.param_groups, *oracle.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        adam.step()
        oracle.step()
    for mine, other, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert (mine - start).abs().max() > 1e-3
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                adam.state[mine][name], oracle.state[other][name], rtol=1e-6, atol=1e-8
            )
    assert [group["step"] for group in adam.param_groups] == [10, 10]


def test_parameters_without_gradient_stand_still() -> None:
    params = parameters()
    adam = TorchAdam(params, lr=0.1, weight_decay=0.5)
    params[0].grad = torch.ones_like(params[0])
    before = [param.detach().clone() for param in params]
    adam.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert params[1] not in adam.state


def test_master_weights_follow_fp32_and_parameters_are_their_rounding() -> None:
    """bf16 weights with a master copy move as the fp32 run does; without one they get stuck."""
    low, alone = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    high = [torch.nn.Parameter(param.detach().float()) for param in low]
    master = TorchAdam(low, lr=1e-4, master_weights=True)
    plain = TorchAdam(alone, lr=1e-4)
    oracle = torch.optim.AdamW(high, lr=1e-4, weight_decay=0.0, fused=False, foreach=False)
    for step in range(20):
        set_gradients(low, step)
        for a, b, h in zip(low, alone, high, strict=True):
            b.grad, h.grad = a.grad.clone(), a.grad.float()  # type: ignore[union-attr]
        for optimizer in (master, plain, oracle):
            optimizer.step()
    stuck = 0
    for a, b, h in zip(low, alone, high, strict=True):
        stored = master.state[a]["master_param"]
        assert stored.dtype == torch.float32
        torch.testing.assert_close(stored, h.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(a.detach(), stored.to(torch.bfloat16))
        stuck += int((b != a).sum())
    assert stuck > 0, "without master weights small updates should have been lost"


def test_low_precision_moments_are_stored_low_and_stay_close() -> None:
    ours, theirs = parameters(), parameters()
    bf16 = torch.bfloat16
    adam = TorchAdam(ours, lr=1e-2, exp_avg_dtype=bf16, exp_avg_sq_dtype=bf16)
    oracle = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        adam.step()
        oracle.step()
    difference = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert adam.state[mine]["exp_avg"].dtype == bf16
        assert adam.get_unscaled_state(mine, "exp_avg").dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
        difference = max(difference, float((mine - other).abs().max().detach()))
    assert difference > 0, "rounded moments cannot give the same weights"


def test_decoupled_gradients_are_the_ones_that_count() -> None:
    ours, theirs = parameters(), parameters()
    adam = TorchAdam(ours, lr=1e-2, use_decoupled_grad=True)
    oracle = TorchAdam(theirs, lr=1e-2)
    set_gradients(ours, 1)
    set_gradients(ours, 0, "decoupled_grad")
    set_gradients(theirs, 0)
    adam.step()
    oracle.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_states_can_be_set_and_asked() -> None:
    param = parameters()[0]
    adam = TorchAdam([param], exp_avg_dtype=torch.bfloat16, master_weights=True)
    adam.set_scaled_state(param, "exp_avg", torch.full_like(param, 1.5))
    assert torch.equal(adam.get_unscaled_state(param, "exp_avg"), torch.full_like(param, 1.5))
    assert torch.equal(adam.get_unscaled_state(param, "master_param"), param.detach())
    assert adam.state[param]["master_param"].data_ptr() != param.data_ptr()

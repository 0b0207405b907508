"""Optimizer state under its parameter's key and global offset, for any optimizer and layout.

Megatron prefixes optimizer keys with the optimizer's place in a chain, and that chain has one
link with EP=1 and two with EP>1, so its own optimizer checkpoints do not survive that change.
Here each state tensor takes the global key, shape and offset of its model parameter instead, so
it can be read back in any layout, by plain, mixed-precision, distributed and precision-aware
optimizers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from moe_train.checkpoint.shards import FlatShard, LocalShard, Range, Sharded, StateDict
from moe_train.checkpoint.staging import Staging

MASTER = "param"
"""Name of the fp32 copy of 16-bit weights, which is what the optimizer updates."""
PLAIN = (torch.float32, torch.bfloat16)
"""States in these are their values; TransformerEngine keeps others with a scale."""


def parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that own parameters on this rank."""
    return [part for part in optimizer.chained_optimizers if part.optimizer is not None]


def state_names(optimizer: Any) -> list[str]:
    """Per-parameter tensors that this optimizer keeps, `MASTER` among them."""
    config = parts(optimizer)[0].config
    names = [*config.descriptor.state_names]
    if config.bf16 or config.fp16:
        names.append(MASTER)
    return names


def optimizer_step(optimizer: Any) -> int:
    """Updates made so far, where the optimizer counts them (Adam's step), else 0."""
    return max(int(group.get("step", 0)) for group in optimizer.param_groups)


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """Set Adam's step in every parameter group."""
    for group in optimizer.param_groups:
        group["step"] = step


def initialise_state(optimizer: Any) -> None:
    """Allocate the state that the first step would, so that there is something to load into."""
    for part in parts(optimizer):
        if not part.config.descriptor.build:
            part.init_state_fn(part.optimizer, part.config)
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                for name in part.config.descriptor.state_names:
                    part.optimizer.state[param].setdefault(name, torch.zeros_like(param))


def state_shards(optimizer: Any, model_state: dict[str, Any], name: str) -> StateDict:
    """State ``name`` of all parameters, keyed by parameter position; nothing is copied.

    Args:
        model_state: this rank's sharded model state, from the same parameters.
    """
    owned = list(_model_params(optimizer))
    # One call for all: each also formats every tensor of the model outside its arguments.
    by_position = get_param_id_to_sharded_param_map(model_state, [param for _, param in owned])
    return {
        str(index): _shard(part, param, name, by_position[index])
        for index, (part, param) in enumerate(owned)
    }


@torch.no_grad()
def master_from_model(optimizer: Any) -> None:
    """Take the master copies from the model's weights, for checkpoints that have none."""
    for part, param in _model_params(optimizer):
        weights = param.detach()
        if not isinstance(part, DistributedOptimizer):
            getattr(param, "main_param", param).detach().copy_(weights)
        elif (own := _range(part, param)) is not None:
            values = weights.view(-1)[slice(*own)]
            state = _raw(part, param, MASTER)
            # Both are on the device: a cast without a copy through the host.
            state.copy_(values.view(state.shape))


def _model_params(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            # The buffers list every parameter, in one order on all data-parallel ranks; the
            # groups list only those of which this rank owns a range.
            for buffer in part.buffers:
                for param in buffer.param_index_map:
                    yield part, param
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for group in part.float16_groups + part.fp32_from_fp32_groups:
                for param in group:
                    yield part, param
        else:
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    yield part, param


def _shard(part: Any, param: torch.nn.Parameter, name: str, sharded: Sharded) -> LocalShard:
    shape = torch.empty(param.shape, dtype=torch.float32, device="meta")
    place = make_sharded_optimizer_tensor(
        sharded, shape, prefix=f"optimizer.state.{name}"
    ).without_data()
    if not isinstance(part, DistributedOptimizer):
        return LocalShard(place, torch.float32, _raw(part, param, name))
    if part.data_parallel_group.size() == 1:
        state = _raw(part, param, name)
        if state.dtype in PLAIN:
            return LocalShard(place, torch.float32, state.view(param.shape))
    return FlatShard(
        place,
        torch.float32,
        param.detach(),
        group=part.data_parallel_group,
        range=_range(part, param),
        get=partial(_get, part, param, name),
        put=partial(_put, part, param, name),
    )


def _raw(part: Any, param: torch.nn.Parameter, name: str) -> torch.Tensor:
    """The state as its optimizer holds it: whole, or this rank's range of it."""
    if not isinstance(part, DistributedOptimizer):
        main = getattr(param, "main_param", param)
        state: torch.Tensor = main if name == MASTER else part.optimizer.state[main][name]
        return state.detach()
    inner, key = _inner(part, param, name)
    state = inner if key is None else part.optimizer.state[inner][key]
    return state.detach()


def _inner(part: Any, param: torch.nn.Parameter, name: str) -> tuple[torch.Tensor, str | None]:
    """The parameter of the inner optimizer, and the state's name there; None: the parameter."""
    group, order = part.model_param_group_index_map[param]
    inner = part.optimizer.param_groups[group]["params"][order]
    if name != MASTER:
        return inner, name
    aware = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return inner, "master_param" if aware else None


def _get(part: Any, param: torch.nn.Parameter, name: str) -> torch.Tensor:
    state = _raw(part, param, name)
    if state.dtype in PLAIN:
        return state
    unpacked: torch.Tensor = part.optimizer.get_unscaled_state(*_inner(part, param, name))
    return unpacked


def _put(
    part: Any, param: torch.nn.Parameter, name: str, values: torch.Tensor, through: Staging
) -> None:
    state = _raw(part, param, name)
    if state.dtype in PLAIN:
        through.to_live(values.view(state.shape), state)
        return
    device = values.to(state.device).view(state.shape)
    part.optimizer.set_scaled_state(*_inner(part, param, name), device)


def _range(part: DistributedOptimizer, param: torch.nn.Parameter) -> Range | None:
    """This rank's range of the flat parameter, or None."""
    if param not in part.model_param_gbuf_map:
        return None
    own = part._get_model_param_range_map(param)["param"]
    return own.start, own.end

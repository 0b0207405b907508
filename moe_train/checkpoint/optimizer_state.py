"""Optimizer state by parameter name, whatever optimizer and layout hold it.

Megatron prefixes optimizer keys with the optimizer's place in a chain, and that chain has one
link with EP=1 and two with EP>1, so its own optimizer checkpoints do not survive that change.
Here each state tensor takes the global key, shape and offset of its model parameter instead, so
it can be read back in any layout, by plain, mixed-precision, distributed and precision-aware
optimizers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

type Sharded = ShardedTensor | ShardedTensorFactory


def parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that own parameters on this rank."""
    return [part for part in optimizer.chained_optimizers if part.optimizer is not None]


def state_names(optimizer: Any) -> list[str]:
    """Per-parameter tensors that this optimizer keeps: ``param`` is the fp32 master copy."""
    names = ["exp_avg", "exp_avg_sq"]
    config = parts(optimizer)[0].config
    if config.bf16 or config.fp16:
        names.append("param")
    return names


def optimizer_step(optimizer: Any) -> int:
    """Updates made so far (Adam's step)."""
    return max(int(group.get("step", 0)) for group in optimizer.param_groups)


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """Set Adam's step in every parameter group."""
    for group in optimizer.param_groups:
        group["step"] = step


def sharded_state(
    optimizer: Any, model_state: dict[str, Any], name: str, *, empty: bool
) -> dict[str, Sharded]:
    """State ``name`` of all parameters as sharded tensors, keyed by parameter position.

    Args:
        model_state: this rank's sharded model state, from the same parameters.
        empty: allocate buffers to load into, instead of reading the state. With a distributed
            optimizer reading is collective over the data-parallel group.
    """
    result: dict[str, Sharded] = {}
    owned = list(_model_params(optimizer))
    # One call for all: each formats every tensor of the model that it was not asked for.
    by_position = get_param_id_to_sharded_param_map(model_state, [param for _, param in owned])
    for index, (part, param) in enumerate(owned):
        sharded = by_position[index]
        if empty:
            value = torch.empty(param.shape, dtype=torch.float32, device="cpu")
        else:
            value = _read(part, param, name)
        result[str(index)] = make_sharded_optimizer_tensor(
            sharded, value, prefix=f"optimizer.state.{name}"
        )
    return result


def initialise_state(optimizer: Any) -> None:
    """Allocate the state that the first step would, so that there is something to load into."""
    for part in parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)


@torch.no_grad()
def load_state(optimizer: Any, name: str, loaded: dict[str, torch.Tensor]) -> None:
    """Put loaded values (from :func:`sharded_state`'s positions) into the optimizer."""
    for index, (part, param) in enumerate(_model_params(optimizer)):
        _write(part, param, name, loaded[str(index)])


@torch.no_grad()
def master_from_model(optimizer: Any) -> None:
    """Take the master copies from the model's weights, for checkpoints that have none."""
    for part, param in _model_params(optimizer):
        _write(part, param, "param", param.detach().float())


def _model_params(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            # The buffers list every parameter, in one order on all data-parallel ranks; the
            # groups list only those of which this rank owns a slice.
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


def _read(part: Any, param: torch.nn.Parameter, name: str) -> torch.Tensor:
    if isinstance(part, DistributedOptimizer):
        return _gathered(part, param, name)
    main = getattr(param, "main_param", param)
    return main.detach() if name == "param" else part.optimizer.state[main][name].float()


def _gathered(part: DistributedOptimizer, param: torch.nn.Parameter, name: str) -> torch.Tensor:
    """Whole local parameter's state from the data-parallel ranks that hold slices of it."""
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    span = _span(part, param)
    if span is not None:
        values = part._get_main_param_and_optimizer_states(param)
        whole[span.start : span.end] = values[name].float().view(-1)
    if part.data_parallel_group.size() > 1:
        dist.all_reduce(whole, group=part.data_parallel_group)
    return whole.view(param.shape)


def _write(part: Any, param: torch.nn.Parameter, name: str, value: torch.Tensor) -> None:
    if isinstance(part, DistributedOptimizer):
        span = _span(part, param)
        if span is not None:
            values = dict(part._get_main_param_and_optimizer_states(param))
            values[name] = value.reshape(-1)[span.start : span.end].to(param.device)
            part._set_main_param_and_optimizer_states(param, values)
        return
    main = getattr(param, "main_param", param)
    target = main.data if name == "param" else part.optimizer.state[main][name]
    target.copy_(value)


def _span(part: DistributedOptimizer, param: torch.nn.Parameter) -> Any:
    """This rank's range of the flat parameter, or None."""
    if param not in part.model_param_gbuf_map:
        return None
    return part._get_model_param_range_map(param)["param"]

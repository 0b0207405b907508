"""gloo where NCCL does more: groups that share one network device, collectives of uneven sizes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Backend, ProcessGroup, ProcessGroupGloo

INTERFACE = "GLOO_SOCKET_IFNAME"


def select_interface(environment: Mapping[str, str] = os.environ) -> str | None:
    """Network interface for gloo where the user named none: loopback if all ranks are on one node.

    gloo otherwise takes the interface of the host name, which a laptop or a container may not
    resolve; ranks of several nodes need that one, since they cannot meet over loopback. Launchers
    that do not set LOCAL_WORLD_SIZE start one node.
    """
    world = environment.get("WORLD_SIZE", "1")
    one_node = environment.get("LOCAL_WORLD_SIZE", world) == world
    return environment.get(INTERFACE, "lo" if one_node else None)


def gather_first_dim(
    megatron: Callable[..., torch.Tensor],
    x_NH: torch.Tensor,
    group: ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """All-gather of rows [N, ...] whose number differs from rank to rank.

    gloo's ``all_gather`` wants equal sizes ("invalid tensor size"), its all-to-all does not.

    Args:
        megatron: the function of ``tensor_parallel.mappings`` that this one stands for.
        output_split_sizes: rows of each rank; None where all have the same number.
    """
    size = group.size()
    if output_split_sizes is None or dist.get_backend(group) != Backend.GLOO:
        return megatron(x_NH, group, output_split_sizes, use_global_buffer)
    output = x_NH.new_empty(sum(output_split_sizes), *x_NH.shape[1:])
    copies = torch.cat([x_NH] * size)
    dist.all_to_all_single(
        output, copies, list(output_split_sizes), [x_NH.shape[0]] * size, group=group
    )
    return output


def reduce_scatter_first_dim(
    megatron: Callable[..., torch.Tensor],
    x_NH: torch.Tensor,
    group: ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Reduce-scatter into numbers of rows that differ: this rank's, summed in the order of ranks.

    Args:
        megatron: the function of ``tensor_parallel.mappings`` that this one stands for.
        input_split_sizes: rows of each rank's part; None where all have the same number.
    """
    size = group.size()
    if input_split_sizes is None or dist.get_backend(group) != Backend.GLOO:
        return megatron(x_NH, group, input_split_sizes, use_global_buffer)
    rows = input_split_sizes[group.rank()]
    parts = x_NH.new_empty(size, rows, *x_NH.shape[1:])
    dist.all_to_all_single(
        parts.flatten(0, 1), x_NH.contiguous(), [rows] * size, list(input_split_sizes), group=group
    )
    return functools.reduce(torch.add, parts.unbind())


@functools.cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()


def _create(options: Any, _: object | None) -> Any:
    # torch's type stubs lack both the options' fields and the constructor that takes them.
    group: Any = ProcessGroupGloo
    own = group._Options()
    own._devices = [_device()]
    own._threads = 1
    own._timeout = options.timeout
    own.global_ranks_in_group = options.global_ranks_in_group
    own.group_name = options.group_id
    return group(options.store, options.group_rank, options.group_size, own)


def share_device() -> None:
    """Make every gloo group of this process from now on use the one device.

    torch gives each group a device of its own, whose thread wakes 100 times a second. A rank of
    a parallel layout is in about 25 groups. torch 2.15 makes gloo groups by its table of
    plugins, 2.11 does not: there this changes nothing, and threads wake more often.
    """
    Backend._plugins[Backend.GLOO.upper()] = Backend._BackendPlugin(_create, True)

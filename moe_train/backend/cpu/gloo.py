"""gloo groups that share one network device: one thread polls for all of a rank's groups."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch.distributed import Backend, ProcessGroupGloo


@cache
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

"""Process groups: the one file that touches Megatron's global ``parallel_state``."""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from moe_train.backend import local_group, patches
from moe_train.backend.rendezvous import missing, rendezvous
from moe_train.errors import HungError

_WORLDS = count(1)
_STORES: dict[tuple[int, int], dist.Store] = {}
_CONNECTION = re.compile(
    r"gloo/transport/|connectFullMesh failed|Connection (closed|reset) by peer", re.IGNORECASE
)
_MISUSE = re.compile(r"enforce fail|nccl(InvalidUsage|InvalidArgument|UnhandledCudaError)")
"""gloo's and NCCL's own checks: sizes or arguments that differ between ranks, not a lost peer."""

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from moe_train.backend.protocol import Backend
    from moe_train.config.training import GroupName, NcclGroup
    from moe_train.parallel.layout import Layout


def open_world(
    backend: Backend, rank: int, world: int, timeout_seconds: int, init_method: str | None = None
) -> None:
    """Join the world: ``torchrun``'s environment, or a world of one without it.

    Communicators of NCCL are created by a group's first collective: with a ``device_id`` here torch
    would create one for every group that is made, used or not. On a GPU the device has to be
    current (:meth:`moe_train.backend.protocol.Backend.prepare`).

    Args:
        init_method: rendezvous URL; None uses the environment, or an in-process store when
            ``world`` is 1 and no environment is set.
    """
    local_group.register()
    options: dict[str, Any] = {
        "backend": local_group.NAME if world == 1 else backend.communication,
        "timeout": datetime.timedelta(seconds=timeout_seconds),
        "rank": rank,
        "world_size": world,
    }
    if init_method is not None:
        options["init_method"] = init_method
    elif world == 1:
        options["store"] = dist.HashStore()
    else:
        # Addresses that an earlier world of these processes left under the same keys would be
        # taken for this one's.
        store = launcher_store(rank, world, timeout_seconds)
        options["store"] = dist.PrefixStore(f"world{next(_WORLDS)}", store)
    dist.init_process_group(**options)


def launcher_store(rank: int, world: int, timeout_seconds: int) -> dist.Store:
    """The launcher's store, or rank 0's own at MASTER_ADDR; lives as long as the process."""
    if (rank, world) not in _STORES:
        limit = datetime.timedelta(seconds=timeout_seconds)
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", rank, world, timeout=limit)))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            others = [0] if rank else list(range(1, world))
            raise missing(others, timeout_seconds) from error
        _STORES[rank, world] = rendezvous(store, rank, world, timeout_seconds)
    return _STORES[rank, world]


def open_groups(
    layout: Layout, *, timeout_seconds: int, nccl: Mapping[GroupName, NcclGroup] | None = None
) -> ProcessGroupCollection:
    """Create every process group of a layout; the world must be open.

    Args:
        nccl: communicator settings by Megatron's names of the groups.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    with _settings_file(nccl or {}) as path, patches.local_singletons():
        _initialize(layout, timeout_seconds, path)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    warm_up(groups.pp)
    return groups


def warm_up(group: dist.ProcessGroup) -> None:
    """Create the communicator of a pipeline group, before its first messages; collective over it.

    Schedules send by ``batch_isend_irecv`` (Megatron's with ``placement=stage`` as well as ours),
    and the first batch is a partial one: in the first tick the last stage has nothing to send or to
    receive. torch requires all ranks of a group to take part in the first call that creates its
    communicator, and documents a hang otherwise (``batch_isend_irecv``, note).
    """
    if group.size() == 1 or dist.get_backend(group) == "fake":
        return
    on_gpu = dist.get_backend(group) == dist.Backend.NCCL
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dist.all_reduce(torch.zeros(1, device=device), group=group)


@contextmanager
def _settings_file(nccl: Mapping[GroupName, NcclGroup]) -> Iterator[str | None]:
    """Megatron takes these settings from a YAML file, and an absent key for NCCL's choice."""
    if not nccl:
        yield None
        return
    given = {
        name: {key: value for key, value in asdict(group).items() if value is not None}
        for name, group in nccl.items()
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as stream:
        yaml.safe_dump(given, stream)
        stream.flush()
        yield stream.name


def _initialize(layout: Layout, timeout_seconds: int, nccl_path: str | None) -> None:
    from megatron.core import parallel_state

    chunks = layout.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert_in_stage,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
        # Only Megatron's own checkpoint formats gather over these; ours do not.
        create_gloo_process_groups=False,
        nccl_communicator_config_path=nccl_path,
    )


def close_world(abort: bool = False) -> None:
    """Destroy all groups, so that another run may start in this process.

    Args:
        abort: this rank failed: drop what NCCL has under way, which destroying would wait for.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if abort and dist.get_backend() == dist.Backend.NCCL:
        # Nobody works with these groups after it.
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> HungError | None:
    """The HungError for a collective that failed because its connection to a peer did, or None.

    gloo raises RuntimeError with its own file names in the text; NCCL's errors have a class.
    """
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    text = str(error)
    failed = isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and _CONNECTION.search(text)
    )
    if not failed or _MISUSE.search(text):
        return None
    return HungError(
        f"rank {os.environ.get('RANK', '0')}",
        f"lost a peer: {text.splitlines()[0]}",
        "look at the other ranks' logs for the first failure, then start again to resume",
    )

"""What saves and loads allocate on the device, counted on fake tensors of any size.

Every tensor is taken to lie on the device, whatever its type says, unless the one function made it
that makes host memory for saves and loads (``staging.host_empty``).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from moe_train.measure.dryrun.tracker import MemoryTracker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_train.checkpoint.shards import FlatShard
    from moe_train.train.engine import Engine


class DeviceTracker(MemoryTracker):
    """Live bytes of the device, and of host memory beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, int] = {}
        """Bytes of host storages, by key."""
        self.host_peak = 0
        self._making_host = False

    def __enter__(self) -> DeviceTracker:
        super().__enter__()
        from moe_train.checkpoint import staging

        plain = staging.host_empty

        def host_empty(*args: Any, **how: Any) -> torch.Tensor:
            self._making_host = True
            try:
                return plain(*args, **how)
            finally:
                self._making_host = False

        self._stack.enter_context(mock.patch.object(staging, "host_empty", host_empty))
        self._stack.enter_context(mock.patch.object(staging, "on_host", self.on_host))
        return self

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made as host memory."""
        return tensor.untyped_storage()._cdata in self.host

    def _note(self, tensor: Any, category: str) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self._making_host and key not in self.host:
            self.host[key] = storage.nbytes()
            self.host_peak = max(self.host_peak, sum(self.host.values()))
            weakref.finalize(storage, self.host.pop, key).atexit = False
        if key not in self.host:
            super()._note(tensor, category)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Collectives on objects, which fake groups cannot carry: every rank answers like this one."""

    def gather_all(gathered: list[Any], own: Any, group: Any = None) -> None:
        gathered[:] = [own] * len(gathered)

    from moe_train.checkpoint import save

    def ranges(shards: Sequence[FlatShard]) -> None:
        for shard in shards:
            shard.ranges = _ranges(shard)

    with (
        mock.patch.object(dist, "all_gather_object", gather_all),
        mock.patch.object(dist, "gather_object", lambda *_, **__: None),
        mock.patch.object(save, "gather_ranges", ranges),
    ):
        yield


def _ranges(shard: FlatShard) -> list[tuple[int, int] | None]:
    """This rank's range, and the rest before and after it in the hands of peers."""
    ranks, rank, whole = shard.group.size(), shard.group.rank(), shard.tensor.numel()
    result: list[tuple[int, int] | None] = [None] * ranks
    begin, end = shard.range or (whole, whole)
    peers = [peer for peer in range(ranks) if peer != rank]
    if begin > 0:
        result[peers[0]] = (0, begin)
    result[rank] = shard.range
    if end < whole:
        result[peers[-1]] = (end, whole)
    return result


def save_added(tracker: DeviceTracker, engine: Engine, folder: Path, *, beside: bool) -> int:
    """Bytes that a save of a fake engine adds on the device at its peak; not on rank 0.

    The program's own save runs, but that no tensor is turned into bytes.
    """
    from moe_train.checkpoint import write
    from moe_train.checkpoint.save import Save
    from moe_train.checkpoint.state_dict import checkpoint_state

    items: list[int] = []

    def consumed(_: Any, __: Any, tensor: torch.Tensor, *___: Any) -> None:
        assert tracker.on_host(tensor), "an item is written from the device"
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        items.append(tensor.numel() * tensor.itemsize)

    assert dist.get_rank() != 0, "rank 0 checks that all others' tensors are there"
    base = _begin(tracker)
    with alone(), mock.patch.object(write, "_write_item", consumed):
        save = Save(
            folder,
            step=1,
            chunks=[chunk.module for chunk in engine.chunks],
            optimizer=engine.optimizer,
            fields={},
            keep=1,
            asynchronous=beside,
        )
        if beside:
            # The tracker follows this thread alone; the other one has host memory only.
            save._pending.result()
    added = tracker.peak().bytes - base
    tree, _ = checkpoint_state([chunk.module for chunk in engine.chunks], engine.optimizer)
    assert sum(items) == write.bytes_to_write(write.plan_sharded(tree)), "something was left out"
    return added


def load_added(tracker: DeviceTracker, engine: Engine) -> int:
    """Bytes that a load into a fake engine adds on the device at its peak.

    The program's own load runs, but that items come from memory and not from a file.
    """
    from moe_train.checkpoint import load, staging
    from moe_train.checkpoint.shards import shards_of

    manifest: Any = SimpleNamespace(
        optimizer_states=["exp_avg", "exp_avg_sq", "param"],
        optimizer_step=1,
        layout="another",
        world=1,
        rng_sizes=[],
    )
    # Every tensor is stored, in the parts that this rank asks for.
    stored: dict[str, TensorStorageMetadata] = {}
    plain = load.plan_reads

    def planned(tree: Any, metadata: Metadata) -> Any:
        for entry in shards_of(tree):
            for item in entry.sharded_tensors(entry.meta()):
                sizes = torch.Size(load.local_sizes(item))
                chunk = ChunkStorageMetadata(torch.Size(item.global_offset), sizes)
                kind = TensorProperties(dtype=item.dtype)
                whole = TensorStorageMetadata(kind, torch.Size(item.global_shape), [])
                stored.setdefault(item.key, whole).chunks.append(chunk)
        return plain(tree, metadata)

    def read_data(plan: Any, planner: Any) -> Any:
        for item in plan.items:
            content = staging.host_empty(item.lengths, torch.float32)
            target = planner.resolve_tensor(item).detach()
            assert tracker.on_host(target), "torch's reader would copy to the device"
            target.copy_(content)
            planner.commit_tensor(item, target)
        return SimpleNamespace(wait=lambda: None)

    @contextlib.contextmanager
    def reader(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(
            read_metadata=lambda: Metadata(stored),  # type: ignore[arg-type]
            set_up_storage_reader=lambda *_: None,
            read_data=read_data,
        )

    base = _begin(tracker)
    with (
        alone(),
        mock.patch.object(load, "reader", reader),
        mock.patch.object(load, "plan_reads", planned),
    ):
        load.load_checkpoint(
            Path("nowhere"),
            manifest,
            chunks=[chunk.module for chunk in engine.chunks],
            optimizer=engine.optimizer,
            layout="this",
        )
    return tracker.peak().bytes - base


def _begin(tracker: DeviceTracker) -> int:
    tracker.begin()
    return tracker.live


def largest(engine: Engine) -> int:
    """Bytes of the largest parameter of a rank in fp32."""
    return max(4 * p.numel() for chunk in engine.chunks for p in chunk.parameters())


def added(
    overrides: Sequence[str], world: int, rank: int, folder: Path, *, vocab: int = 0
) -> dict[str, int]:
    """Bytes that each way through a checkpoint adds on the device of one rank, at its peak.

    Returns:
        ``save``, ``beside`` (``checkpoint.asynchronous``) and ``load`` on the device; ``host``,
        the most host memory of the plain save; ``state``, all that the rank holds on its device;
        ``parameter``, the largest in fp32.
    """
    from moe_train.checkpoint.optimizer_state import initialise_state
    from moe_train.measure.dryrun.prepare import cpu_backend
    from moe_train.measure.dryrun.world import fake_engine, fake_world
    from moe_train.planner.resolution import resolve_run

    run = resolve_run(list(overrides), world)
    run = run.with_vocabulary(vocab or run.vocab, "test")
    backend = cpu_backend(run.config)
    with fake_world(rank, world), DeviceTracker() as tracker:
        engine = fake_engine(run, backend)
        initialise_state(engine.optimizer)
        result = {"state": tracker.live, "parameter": largest(engine)}
        result["save"] = save_added(tracker, engine, folder, beside=False)
        result["host"] = tracker.host_peak
        result["beside"] = save_added(tracker, engine, folder, beside=True)
        result["load"] = load_added(tracker, engine)
        return result

"""Streamed saves and loads: the bytes of Megatron's own writer, whatever lies on a device; a
failure in the middle is every rank's, and none is left waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.testing.layouts import DP2, EP2, PP2_EP2_SPAN, SMALL, Layout
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world
WORDS = [*SMALL, "device=cpu", "model.layers=2"]
LOW = ("dtype=bf16",)
AWARE = (*LOW, "optim.distributed=true", "optim=precision_aware")
LAYOUTS = {
    "fp32": EP2,
    "mixed precision": Layout("", 2, {"tensor": 2}, LOW),
    "slices": Layout("", 2, DP2.sizes, AWARE),
    "spanning": Layout("", 2, PP2_EP2_SPAN.sizes, (*PP2_EP2_SPAN.extra, *AWARE)),
}
LONG = ("fp32", "mixed precision")
FACTS: dict[str, Any] = {
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "model": {},
    "layout": "this",
    "world": 2,
    "seed": 1,
    "tokenizer": "unknown",
}


def save(engine: Any, root: Path, step: int, *, beside: bool = False) -> Path:
    from moe_train.checkpoint.save import Save

    modules = [chunk.module for chunk in engine.chunks]
    return Save(
        root,
        step=step,
        chunks=modules,
        optimizer=engine.optimizer,
        fields=FACTS,
        keep=99,
        asynchronous=beside,
    ).commit()


def load(engine: Any, folder: Path) -> None:
    from moe_train.checkpoint.load import load_checkpoint
    from moe_train.checkpoint.manifest import read_manifest

    modules = [chunk.module for chunk in engine.chunks]
    load_checkpoint(
        folder, read_manifest(folder), chunks=modules, optimizer=engine.optimizer, layout="this"
    )


def opened(rank: int, world: int, arguments: list[str]) -> Any:
    """An engine whose state is all different numbers."""
    import torch

    from moe_train.checkpoint.optimizer_state import initialise_state
    from tests.support.engines import open_engine

    engine = open_engine(rank, world, arguments)
    initialise_state(engine.optimizer)
    generator = torch.Generator().manual_seed(7 + rank)
    for values in held(engine):
        values.copy_(torch.randn(values.shape, generator=generator))
    return engine


def held(engine: Any) -> list[Any]:
    """Every tensor of the state, as its owner holds it."""
    import torch

    results = [parameter.detach() for chunk in engine.chunks for parameter in chunk.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups if part.optimizer else []:
            for parameter in group["params"]:
                states = part.optimizer.state[parameter].values()
                results += [parameter.detach(), *filter(torch.is_tensor, states)]
    return [values for values in results if values.is_floating_point()]


def by_megatron(engine: Any, folder: Path) -> None:
    """Save the state as a whole by Megatron's strategy: its planner, its staging, its writer."""
    import queue

    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from moe_train.checkpoint.shards import FlatShard
    from moe_train.checkpoint.state_dict import checkpoint_state

    def whole(entry: Any) -> Any:
        if not isinstance(entry, FlatShard):
            return entry.with_data(entry.tensor.to(entry.dtype))
        values = torch.zeros(entry.tensor.numel())
        if entry.range is not None:
            values[slice(*entry.range)] = entry.get().float().view(-1)
        dist.all_reduce(values, group=entry.group)
        return entry.with_data(values.view(entry.shape))

    tree, _ = checkpoint_state([chunk.module for chunk in engine.chunks], engine.optimizer)
    sharded, _ = save_preprocess(dict_list_map_outplace(whole, tree), False)
    filesystem_async._results_queue = queue.Queue()
    TorchDistSaveShardedStrategy().save(sharded, folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.distcp"))}


def compared(rank: int, world: int, arguments: list[str], root: str) -> list[str]:
    """Ways of saving whose files differ from Megatron's, or that a load does not bring back."""
    import torch
    import torch.distributed as dist

    from moe_train.checkpoint import staging

    engine = opened(rank, world, arguments)
    reference = Path(root) / "megatron"
    reference.mkdir(exist_ok=True)
    by_megatron(engine, reference)
    theirs, wrong = content(reference), []
    assert sum(map(len, theirs.values())) > 500_000

    def check(step: int, name: str, **how: Any) -> Path:
        folder = save(engine, Path(root), step, **how)
        dist.barrier()
        if content(folder) != theirs:
            wrong.append(name)
        return folder

    plain = check(1, "plain")
    check(2, "beside", beside=True)
    # From here on all lies on a device that takes pieces of 8 KiB.
    staging.PIECE, on_host = 8192, staging.on_host
    staging.on_host = lambda tensor: False
    check(3, "from a device")
    check(4, "beside, from a device", beside=True)
    loaded = []
    for step, there in ((5, staging.on_host), (6, on_host)):
        staging.on_host = there
        for values in held(engine):
            values.zero_()
        load(engine, plain)
        loaded.append([values.clone() for values in held(engine)])
        check(step, f"loaded, {step}")
    # What this rank does not write itself, since another one has the same, was loaded as well.
    if not all(torch.equal(one, other) and one.any() for one, other in zip(*loaded, strict=True)):
        wrong.append("loads differ")
    return wrong


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] if name in LONG else []) for name in LAYOUTS],
)
def test_bytes_are_those_of_megatrons_writer(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    overrides = [*WORDS, *layout.overrides]
    assert run_world(compared, layout.world, overrides, str(tmp_path)) == [[], []]


def failing(rank: int, world: int, arguments: list[str], root: str) -> dict[str, str]:
    """What each rank is told when one of them fails in the middle of a stream."""
    import torch
    import torch.distributed as dist

    from moe_train.checkpoint import write
    from moe_train.checkpoint.folders import committed
    from moe_train.checkpoint.load import _LoadPlanner
    from moe_train.checkpoint.shards import ParameterGather
    from moe_train.checkpoint.staging import Staging
    from moe_train.errors import MoeTrainError

    engine, output = opened(rank, world, arguments), {}
    sound = save(engine, Path(root), 1)

    def spoil(owner: Any, name: str, fault: BaseException, victim: int, after: int) -> Any:
        plain, calls = getattr(owner, name), []

        def spoilt(*args: Any, **how: Any) -> Any:
            calls.append(name)
            if rank == victim and len(calls) > after:
                raise fault
            return plain(*args, **how)

        setattr(owner, name, spoilt)
        return lambda: setattr(owner, name, plain)

    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
    full = OSError(28, "No space left on device")
    cases: dict[str, tuple[Any, str, BaseException, int, int]] = {
        "disk full": (write, "_write_item", full, 0, 20),
        "no memory to write": (Staging, "to_host", oom, 0, 30),
        "no memory to bring together": (ParameterGather, "__init__", oom, 1, 0),
        "no memory to load": (_LoadPlanner, "commit_tensor", oom, 1, 12),
        "torn item": (_LoadPlanner, "resolve_tensor", RuntimeError("a bad record"), 1, 12),
    }
    for name, case in cases.items():
        restore = spoil(*case)
        for beside in (False, True) if case[0] is not _LoadPlanner else (False,):
            try:
                if case[0] is _LoadPlanner:
                    load(engine, sound)
                else:
                    save(engine, Path(root), 2, beside=beside)
                output[f"{name} {beside}"] = "nothing"
            except MoeTrainError as fault:
                output[f"{name} {beside}"] = f"{type(fault).__name__} {fault}"
            dist.barrier()
            assert [path.name for path in Path(root).iterdir()] == [sound.name]
        restore()
    load(engine, sound)
    after = save(engine, Path(root), 2)
    assert committed(Path(root)) == [after, sound]
    assert content(after) == content(sound)
    return output


def test_a_failure_in_the_middle_is_every_ranks(tmp_path: Path) -> None:
    overrides = [*WORDS, *LAYOUTS["slices"].overrides]
    one, other = run_world(failing, 2, overrides, str(tmp_path), timeout=120)
    assert one == other
    assert len(one) == 8
    for name, output in one.items():
        if "no memory" in name:
            victim = 0 if "write" in name else 1
            assert output.startswith(f"DeviceMemoryError rank {victim}: out of device memory"), (
                output
            )
        elif "disk" in name:
            assert "(rank 0: OSError: [Errno 28] No space left on device)" in output, output
        else:
            assert output.startswith("CheckpointError"), output
            assert "cannot be loaded (rank 1: RuntimeError: a bad record)" in output, output

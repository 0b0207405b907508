"""Communicators: singletons have none, others begin with their first use, and the plan knows them.

gloo counts the operations of a group (its sequence number), which stands here for what would make
NCCL create a communicator.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.backend import groups as backend_groups
from moe_train.backend import local_group
from moe_train.backend.cuda.backend import CudaBackend
from moe_train.parallel.groups import OPTIMIZER, WORLD, communicators, used_kinds
from moe_train.parallel.layout import GROUPS
from moe_train.planner.resolution import resolve_run
from moe_train.testing.world import run_world
from tests.support.engines import micro_batches, open_engine

SMALL = [
    *("experiment=twin", "parallel=single", "recompute=none", "model.layers=4", "model.hidden=32"),
    *("model.heads=4", "model.head_dim=8", "model.experts=8", "model.expert_hidden=16"),
    *("data.sequence=16", "batch.global=8", "batch.micro=1", "device=cpu"),
]
MEGATRON = {
    "default_pg": WORLD,
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "MODEL_PARALLEL_GROUP": "mp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "tp_ep_pp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": OPTIMIZER,
}
"""Megatron's names of the groups and ours; a group under any other name has to stay unused."""
Seen = dict[str, tuple[list[int], str, int]]


def counted(rank: int, world: int, args: list[str]) -> tuple[Seen, Seen]:
    """Ranks, backend and operations of every group of this rank: after opening, after a step."""
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, args)
    opened = _groups()
    samples = engine.run.microbatches * engine.config.batch.micro * engine.groups.dp.size()
    tokens = torch.randint(128, (samples, engine.config.data.sequence + 1)).numpy()
    train_step(engine, micro_batches(engine, tokens), 1)
    return opened, _groups()


def _groups() -> Seen:
    result = {}
    for group in dist.distributed_c10d._world.pg_names:
        backend = dist.get_backend(group)
        count = 0 if backend == "local" else group._get_sequence_number_for_group()
        result[group.group_desc] = (dist.get_process_group_ranks(group), backend, count)
    return result


LAYOUTS = {
    "span": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4"]
    + ["parallel.placement=span"],
    "thin span": ["parallel.pipeline=2", "parallel.expert=2", "parallel.placement=span"],
    "stages": ["parallel.pipeline=2", "parallel.expert=2", "optim.distributed=true"],
    "experts": ["parallel.tensor=2", "parallel.expert=1", "parallel.expert_tensor=2"],
    "replicas": ["parallel.expert=2", "model.router.balancing=global_aux"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2"],
    "biased": ["parallel.tensor=2", "model.router.score=sigmoid"]
    + ["model.router.expert_bias=true", "model.router.balancing=none"],
    "sequences": ["parallel.tensor=2", "parallel.pipeline=2", "model.router.balancing=seq_aux"],
}


@pytest.mark.world
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full] * (name not in ("span", "stages")))
        for name in LAYOUTS
    ],
)
def test_groups_are_used_as_the_plan_says(name: str) -> None:
    overrides = [*SMALL, *LAYOUTS[name]]
    run = resolve_run(overrides, 4)
    config, layout = run.config, run.layout
    everybody = [list(range(4))]
    planned = {
        kind: everybody if kind in (WORLD, OPTIMIZER) else layout.groups(kind)
        for kind in used_kinds(config, layout)
    }
    for rank, (opened, trained) in enumerate(run_world(counted, 4, overrides)):
        for kind, (ranks, backend, count) in opened.items():
            assert (backend == "local") == (len(ranks) == 1), (kind, ranks, backend)
            # The first operation of a pipeline group is one of all its members, before any
            # message; the world's ones are the store's and the optimizer's agreement.
            expected = int(kind == "PIPELINE_MODEL_PARALLEL_GROUP" and len(ranks) > 1)
            assert kind == "default_pg" or count == expected, (kind, count)
        used = {kind: ranks for kind, (ranks, _, count) in trained.items() if count}
        assert used.keys() <= MEGATRON.keys(), f"{name}: used and not planned: {used}"
        mine = {
            kind: group
            for kind, result in planned.items()
            for group in result
            if rank in group and len(group) > 1
        }
        assert {MEGATRON[kind]: ranks for kind, ranks in used.items()} == mine


def test_a_warm_up_is_an_operation_of_the_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: on the device that is current, which `prepare` has set."""
    calls: list[Any] = []
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda one: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: calls.append((tensor, group)))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    backend_groups.warm_up(group)  # type: ignore[arg-type]
    assert calls == [(torch.device("cuda", 3), group)]
    backend_groups.warm_up(SimpleNamespace(size=lambda: 1))  # type: ignore[arg-type]
    assert len(calls) == 1, "a stage alone sends nothing"


@pytest.mark.parametrize(("world", "backend"), [(1, "local"), (2, "nccl")])
def test_nccl_is_not_bound_to_a_device_and_a_world_of_one_needs_none(
    monkeypatch: pytest.MonkeyPatch, world: int, backend: str
) -> None:
    """With a ``device_id`` torch creates the communicator of every group at once."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **options: given.update(options))
    cuda = object.__new__(CudaBackend)
    backend_groups.open_world(cuda, 0, world, 60, "tcp://127.0.0.1:1")
    assert given["backend"] == backend and "device_id" not in given


def test_waiting_orders_the_stream_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Stream:
        def record_event(self) -> str:
            log.append("recorded")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append(f"waits for {event}")

    module = SimpleNamespace(current_stream=lambda device: Stream())
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    moved = SimpleNamespace(device=torch.device("cuda", 0))
    work = local_group._Done([moved, moved])  # type: ignore[list-item]
    assert log == ["recorded"]
    assert work.wait() and log == ["recorded", "waits for event"]


def compared(rank: int, world: int) -> list[str]:
    """Every collective in a gloo group of one rank and in a local one; the names of those alike."""
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.backend.groups import open_world
    from moe_train.config.training import BackendConfig

    open_world(CpuBackend(BackendConfig()), rank, world, 60)
    assert dist.get_backend() == "local"
    local, gloo = dist.group.WORLD, dist.new_group([0], backend="gloo")
    alike = []
    for name, operation in OPERATIONS.items():
        results = [operation(group, torch.arange(6.0).view(3, 2) / 7) for group in (local, gloo)]
        if all(map(_same, *results)):
            alike.append(name)
    dist.destroy_process_group()
    return alike


def _same(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other) if torch.is_tensor(one) else one == other)


def _into(operation: Any, *more: Any, wraps: bool = False) -> Any:
    def run(group: Any, tensor: torch.Tensor) -> list[Any]:
        outputs = [torch.full_like(tensor, -1.0) for _ in range(2)]
        given = [tensor] if wraps else tensor
        operation(outputs[0], given, *more, group=group)
        work = operation(outputs[1], given, *more, group=group, async_op=True)
        assert work.wait() is not False
        return [*outputs, tensor]

    return run


def _listed(group: Any, tensor: torch.Tensor) -> list[Any]:
    gathered, exchanged, got = ([torch.full_like(tensor, -1.0)] for _ in range(3))
    dist.all_gather(gathered, tensor, group=group)
    dist.all_to_all(exchanged, [tensor + 1], group=group) if group is dist.group.WORLD else (
        exchanged[0].copy_(tensor + 1)  # gloo has no all-to-all of lists
    )
    dist.gather(tensor + 2, got, group=group)
    scattered = torch.full_like(tensor, -1.0)
    dist.scatter(scattered, [tensor + 3], group=group)
    return [*gathered, *exchanged, *got, scattered]


def _in_place(group: Any, tensor: torch.Tensor) -> list[Any]:
    works = [
        dist.all_reduce(tensor, group=group, async_op=True),
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True),
        dist.broadcast(tensor, 0, group=group, async_op=True),
        dist.reduce(tensor, 0, group=group, async_op=True),
        dist.barrier(group=group, async_op=True),
    ]
    for work in works:
        work.wait()
    return [tensor]


def _objects(group: Any, tensor: torch.Tensor) -> list[Any]:
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, {"a": 1}, group=group)
    output = ["told"]
    dist.broadcast_object_list(output, 0, group=group)
    got: list[Any] = [None]
    dist.gather_object("mine", got, group=group)
    return [*gathered, *output, *got]


def _view(group: Any, tensor: torch.Tensor) -> list[Any]:
    """As Megatron's buckets: the shard is a view of the whole."""
    dist.reduce_scatter_tensor(tensor[:3], tensor, group=group)
    dist.all_gather_into_tensor(tensor, tensor[:3], group=group)
    return [tensor]


def _coalesced(group: Any, tensor: torch.Tensor) -> list[Any]:
    results = [torch.full_like(tensor, -1.0) for _ in range(3)]
    if group is not dist.group.WORLD:
        return [tensor, tensor, tensor]  # gloo coalesces all-reduces only
    manager = dist.distributed_c10d._coalescing_manager
    with manager(group, async_ops=True) as works:
        for output in results[:2]:
            dist.all_gather_into_tensor(output, tensor, group=group)
    works.wait()
    with manager(group):
        dist.reduce_scatter_tensor(results[2], tensor, group=group)
    return results


OPERATIONS: dict[str, Any] = {
    "in place": _in_place,
    "all_gather_into_tensor": _into(dist.all_gather_into_tensor),
    "reduce_scatter_tensor": _into(dist.reduce_scatter_tensor),
    "reduce_scatter": _into(dist.reduce_scatter, wraps=True),
    "all_to_all_single": _into(dist.all_to_all_single),
    "all_to_all_single with splits": _into(dist.all_to_all_single, [3], [3]),
    "lists": _listed,
    "objects": _objects,
    "views": _view,
    "coalesced": _coalesced,
}


@pytest.mark.world
def test_a_local_group_answers_as_gloo_does() -> None:
    assert run_world(compared, 1) == [list(OPERATIONS)]


def test_what_a_group_of_one_cannot_do_is_refused() -> None:
    group = local_group.LocalGroup(0, 1)
    rows = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="rows for one rank"):
        group.alltoall_base(torch.empty(3, 2), rows, [2], [3])
    with pytest.raises(ValueError, match="no peer"):
        group.send([rows], 0, 0)
    options = SimpleNamespace(reduceOp=dist.ReduceOp.PREMUL_SUM)
    with pytest.raises(ValueError, match="PREMUL_SUM"):
        group.allreduce([rows], options)


def test_the_plan_counts_what_the_literal_layout_opens() -> None:
    run = resolve_run(["experiment=moe_30b_8x64gb"], 8)
    config, layout = run.config, run.layout
    groups = {kind: layout.groups(kind) for kind in GROUPS}
    assert communicators(config, layout, groups) == {
        "world": 8,
        "tp": 2,
        "pp": 4,
        "mp": 8,
        "optimizer": 8,
        "tp_cp": 2,
    }
    run = resolve_run(SMALL, 1)
    config, alone = run.config, run.layout
    assert communicators(config, alone, {kind: alone.groups(kind) for kind in GROUPS}) == {}

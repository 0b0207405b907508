"""What stands in for a GPU in a rehearsal, held to what the real thing does.

Each function is called in every rank of a small world inside the stand-ins, and raises
AssertionError where one of them behaves otherwise than torch documents for CUDA.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from moe_train.backend.cuda.backend import CudaBackend
from moe_train.config.training import BackendConfig

MIB = 2**20


def _device() -> torch.device:
    return CudaBackend(int(os.environ["LOCAL_RANK"]), BackendConfig()).device


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


def runtime(rank: int) -> None:
    """torch's own allocator, streams, events, pinned memory and copies, on the library."""
    device = _device()
    torch.cuda.set_device(device)
    assert torch.cuda.current_device() == rank
    before = torch.cuda.memory_allocated(device)
    tensor = torch.empty(MIB, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_allocated(device) == before + MIB
    del tensor
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.max_memory_allocated(device) >= before + MIB
    try:
        torch.empty(2**40, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as full:
        assert "Tried to allocate 1024.00 GiB" in str(full)
    else:
        raise AssertionError("a device takes more than it has")

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream(device)
    first.record()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream(device) == stream
        last.record()
    stream.wait_event(last)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    assert last.query()
    assert first.elapsed_time(last) >= 0

    pinned = torch.arange(5.0).pin_memory()
    assert pinned.is_pinned()
    assert not torch.arange(5.0).is_pinned()
    moved = pinned.to(device, non_blocking=True)
    back = torch.empty_like(pinned, pin_memory=True)
    back.copy_(moved, non_blocking=True)
    assert torch.equal(back, pinned)
    assert moved[3].item() == 3.0


def threads(rank: int) -> None:
    """A new thread computes, and has device 0 current, as CUDA's threads do."""
    torch.cuda.set_device(_device())
    seen: list[Any] = []

    def work() -> None:
        seen.append(torch.cuda.current_device())
        torch.cuda.set_device(_device())
        seen.append(torch.ones(3, device=_device()).sum().item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 3.0], seen


def memory_is_shared(rank: int) -> None:
    """Views, swapped data and resized storages are those of one memory, in place operations too."""
    device = _device()
    flat = torch.zeros(12, device=device)
    matrix, tail = flat[:8].view(2, 4), flat[8:]
    matrix.t()[1].add_(2)
    tail.fill_(7)
    assert flat.tolist() == [0, 2, 0, 0, 0, 2, 0, 0, 7, 7, 7, 7]
    weight = torch.nn.Parameter(torch.ones(4, device=device))
    weight.data = flat[8:]
    weight.data.mul_(2)
    assert flat[8:].tolist() == [14.0] * 4
    storage = flat.untyped_storage()
    assert storage.data_ptr() == matrix.untyped_storage().data_ptr()
    spare = torch.ones(1000, device=device)
    spare.untyped_storage().resize_(0)
    assert spare.untyped_storage().nbytes() == 0
    spare.untyped_storage().resize_(4000)
    spare.zero_()
    assert spare.sum().item() == 0
    odd = torch.arange(24, device=device).view(2, 3, 4).transpose(0, 2)[1:]
    assert odd.contiguous().tolist() == torch.arange(24).view(2, 3, 4).transpose(0, 2)[1:].tolist()


def random_numbers(rank: int) -> None:
    """The device's generator: its state is set, read and moves on; the host's stands still."""
    device = _device()
    torch.manual_seed(5)
    host = torch.get_rng_state()
    state = torch.cuda.get_rng_state(device)
    first = torch.rand(4, device=device)
    dropped = functional.dropout(torch.ones(64, device=device), 0.5)
    assert 0 < dropped.count_nonzero().item() < 64
    assert torch.rand(4, device=device).tolist() != first.tolist()
    torch.cuda.set_rng_state(state, device)
    assert torch.rand(4, device=device).tolist() == first.tolist()
    assert torch.equal(torch.get_rng_state(), host)
    assert _refused(lambda: torch.cuda.set_rng_state(host, device))


def substitutes(rank: int) -> None:
    """Operations that only CUDA has give the CPU's values, to the bit, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        SDPBackend.FLASH_ATTENTION: (torch.bfloat16, 2),
        SDPBackend.CUDNN_ATTENTION: (torch.bfloat16, 2),
        SDPBackend.EFFICIENT_ATTENTION: (torch.float32, 4),
    }

    def attend(device: Any, dtype: torch.dtype, heads: int) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(0)
        shapes = ((2, 4, 16, 16), (2, heads, 16, 16), (2, heads, 16, 16))
        inputs = [
            torch.randn(shape, generator=source).to(device, dtype).requires_grad_()
            for shape in shapes
        ]
        q, k, v = inputs
        output = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads < 4
        )
        gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
        return [value.detach().cpu() for value in (output, *gradients)]

    for kernel, (dtype, heads) in kernels.items():
        with sdpa_kernel(kernel):
            ours = attend(_device(), dtype, heads)
        theirs = attend("cpu", dtype, heads)
        assert all(map(torch.equal, ours, theirs)), kernel

    def norm(device: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(0)
        x, weight, upward = (
            torch.randn(shape, generator=source).to(device, dtype).requires_grad_()
            for shape in ((3, 5, 64), (64,), (3, 5, 64))
        )
        output = functional.rms_norm(x, (64,), weight, 1e-5)
        gradients = torch.autograd.grad(output, (x, weight), upward)
        return [value.detach().cpu() for value in (output, *gradients)]

    for dtype in (torch.float32, torch.bfloat16):
        assert all(map(torch.equal, norm(_device(), dtype), norm("cpu", dtype))), dtype


def kernels_are_needed(rank: int) -> None:
    """Outside the mode a kernel is launched, and refused: nothing computes by accident."""
    from torch.utils._python_dispatch import _disable_current_modes

    tensor = torch.ones(3, device=_device())
    with _disable_current_modes():
        assert _refused(lambda: tensor + tensor)
    assert (tensor + tensor).tolist() == [2.0] * 3


def operands(rank: int) -> None:
    """Which operands of the host torch takes on CUDA: numbers in pointwise operations."""
    device = _device()
    x, host, number = torch.ones(3, device=device), torch.ones(3), torch.tensor(2.0)
    index, step = torch.tensor([0, 1]), torch.tensor(1.0)
    accepted: list[Callable[[], Any]] = [
        lambda: x + number,
        lambda: number * x,
        lambda: torch.where(x > 0, x, number),
        lambda: x.masked_fill(x > 0, number),
        lambda: x.clone().copy_(host),
        lambda: host.clone().copy_(x),
        lambda: x.to("cpu") + host,
    ]
    refused: list[Callable[[], Any]] = [
        lambda: x + host,
        lambda: number.clone().add_(x.sum()),
        lambda: torch.cat([x, host]),
        lambda: torch.stack([x.sum(), number]),
        lambda: x.index_select(0, index),
        lambda: x.gather(0, index),
        lambda: x.index_put((index,), host[:2]),
        lambda: functional.embedding(index, x.view(3, 1)),
        lambda: torch.mm(x.view(1, 3), host.view(3, 1)),
        lambda: torch._fused_adamw_(
            [x], [x], [x], [x], [], [step], lr=1.0, beta1=0.9, beta2=0.9,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        ),
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
    ]  # fmt: skip
    for number_of, call in enumerate(accepted):
        assert not _refused(call), f"accepted {number_of}"
    for number_of, call in enumerate(refused):
        assert _refused(call), f"refused {number_of}"


def reads(rank: int) -> None:
    """Every way in which the host reads the device is counted, once."""
    from moe_train.rehearsal.kernels import HostKernels
    from moe_train.rehearsal.rules import Recorder

    x = torch.arange(4.0, device=_device())
    ways: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu", non_blocking=True),
        lambda: torch.empty(4).copy_(x),
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 1),
        lambda: x[x > 1],
        lambda: bool(x.sum() > 1),
        lambda: x.unique(),
        lambda: torch.equal(x, x),
        lambda: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device)),
    ]
    for number, call in enumerate(ways):
        with HostKernels(recorder := Recorder()):
            call()
        assert sum(recorder.copies.values()) == 1, (number, recorder.copies)
    with HostKernels(recorder := Recorder()):
        x.masked_fill(x > 1, 0.0).view(2, 2).t().sum(dim=0)
    assert not recorder.copies


def communicator(rank: int) -> None:
    """Collectives of NCCL in two ranks, with torch's own calls and in batches."""
    device = _device()
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group: Any = dist.new_group([0, 1])
    assert dist.get_backend(group) == "nccl"
    peer = 1 - rank
    ours = torch.full((4,), float(rank + 1), device=device)

    total = ours.clone()
    dist.all_reduce(total, group=group)
    assert total.tolist() == [3.0] * 4
    gathered = torch.empty(8, device=device)
    dist.all_gather_into_tensor(gathered, ours)
    assert gathered.tolist() == [1.0] * 4 + [2.0] * 4
    part = torch.empty(4, device=device)
    dist.reduce_scatter_tensor(part, gathered)
    assert part.tolist() == [2.0 * (rank + 1)] * 4
    swapped = torch.empty(rank + 1 + 1, device=device)
    work = dist.all_to_all_single(
        swapped, ours[: rank + 2], [1, rank + 1], [1, rank + 1], group=group, async_op=True
    ) if rank == 0 else dist.all_to_all_single(
        swapped, ours[:3], [1, 2], [1, 2], group=group, async_op=True
    )  # fmt: skip
    assert work is not None
    work.wait()
    assert swapped[0].item() == 1.0

    received = torch.empty(4, device=device)
    operations = [
        dist.P2POp(dist.isend, ours, peer, group),
        dist.P2POp(dist.irecv, received, peer, group),
    ]
    for one in dist.batch_isend_irecv(operations):
        one.wait()
    assert received.tolist() == [float(peer + 1)] * 4
    first, second = ours.clone(), ours.clone()
    with dist._coalescing_manager(group, device, async_ops=True) as manager:
        dist.all_reduce(first, group=group)
        dist.all_reduce(second, group=group)
    manager.wait()
    assert first.tolist() == second.tolist() == [3.0] * 4
    names: list[Any] = [None, None]
    dist.all_gather_object(names, f"rank {rank}")
    assert names == ["rank 0", "rank 1"]
    assert _refused(lambda: dist.all_reduce(torch.ones(1)))
    on_host: Any = dist.new_group([0, 1], backend="gloo")
    plain = torch.ones(1)
    dist.all_reduce(plain, group=on_host)
    assert plain.item() == 2.0
    dist.all_reduce(ours, group=on_host)
    assert ours.tolist() == [3.0] * 4
    dist.barrier()
    dist.destroy_process_group()


def groups_without_communicators(rank: int) -> None:
    """torch's real NCCL backend, under a run's environment, opens no communicator with a group.

    There is no device to open one on, so a backend that does fails at once: torch 2.15's newer one
    does, which a run's environment therefore switches off.
    """
    from unittest import mock

    from torch._C import _distributed_c10d
    from torch.distributed import distributed_c10d

    from moe_train.backend.cuda.environment import NCCL2, set_environment

    def open_group() -> None:
        getattr(dist.Backend, "_plugins", {}).pop("NCCL", None)
        try:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
            dist.new_group([0])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    torch.cuda.set_device(_device())
    real = _distributed_c10d.ProcessGroupNCCL
    with mock.patch.object(distributed_c10d, "ProcessGroupNCCL", real):
        if hasattr(_distributed_c10d, "ProcessGroupNCCL2"):
            os.environ[NCCL2] = "1"
            assert _refused(open_group)
            del os.environ[NCCL2]
        set_environment(BackendConfig())
        open_group()


def listing(rank: int) -> None:
    """``nvidia-smi`` lists the devices that CUDA has."""
    args = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total"]
    done = subprocess.run(
        [*args, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    assert len(lines) == torch.cuda.device_count()
    for number, (index, _, name, mebibytes) in enumerate(lines):
        properties = torch.cuda.get_device_properties(number)
        assert int(index) == number
        assert name == properties.name
        assert int(mebibytes) == properties.total_memory // MIB

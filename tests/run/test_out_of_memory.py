"""Memory that runs out anywhere ends the run as such: message, exit code, status, promptly."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from moe_train.backend.memory import memory_fault
from moe_train.errors import (
    EXIT_FINISHED,
    EXIT_HUNG,
    EXIT_MEMORY,
    CheckpointError,
    DeviceMemoryError,
    HostMemoryError,
    HungError,
)
from moe_train.planner.resolution import resolve_run
from moe_train.run.failure import explain
from moe_train.run_folder.status import read_status
from moe_train.testing.world import run_world
from tests.support.faults import Fault, faulty
from tests.support.survival import FAULTY, named, notes

# torch 2.9 to 2.15; "with ... in private pools" only where there are any.
TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.94 GiB memory in "
    "use. Of the allocated memory 76.10 GiB is allocated by PyTorch, with 12.00 MiB allocated in "
    "private pools (e.g., CUDA Graphs), and 1.10 GiB is reserved by PyTorch but unallocated. If "
    "reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
)
OOM = torch.OutOfMemoryError(TORCH)
TOLD = "requested 2.15 GB where 1.29 GB of 84.99 GB were free"


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "phrases"),
    [
        (
            OOM,
            DeviceMemoryError,
            [TOLD, "83.69 GB held", "81.71 GB of tensors", "1.18 GB reserved"],
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            DeviceMemoryError,
            ["requested 0.02 GB"],
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), DeviceMemoryError, ["CUDA error: out"]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), DeviceMemoryError, []),
        # What expandable segments' own calls say, and a kernel of Triton.
        (RuntimeError("CUDA driver error: out of memory"), DeviceMemoryError, []),
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceMemoryError, []),
        (RuntimeError("CUDNN_STATUS_ALLOCATION_FAILED"), DeviceMemoryError, []),
        (
            torch.distributed.DistBackendError("NCCL: Cuda failure 2 'out of memory'"),
            DeviceMemoryError,
            [],
        ),
        (raised_from(HungError("rank 0", "exchange"), OOM), DeviceMemoryError, [TOLD]),
        (raised_from(CheckpointError("c", "torn"), OOM), DeviceMemoryError, [TOLD]),
        (CheckpointException("of ranks", {1: (OOM, None)}), DeviceMemoryError, [TOLD]),
        (MemoryError(), HostMemoryError, ["host memory"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), HostMemoryError, []),
    ],
)
def test_every_way_of_running_out_is_told(error: Any, kind: type, phrases: list[str]) -> None:
    fault = memory_fault(error)
    assert type(fault) is kind and fault.exit_code == EXIT_MEMORY
    assert all(word in str(fault) for word in phrases), str(fault)


def test_the_hosts_allocator_is_asked_itself() -> None:
    """torch's own error, in the installed version's words."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    fault = memory_fault(caught.value)
    assert isinstance(fault, HostMemoryError) and "requested 4000000.00 GB" in fault.problem


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),
        OSError(errno.ENOSPC, "No space left on device"),
        CheckpointError("c", "a disk out of memory and luck"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_no_memory(error: Exception) -> None:
    assert memory_fault(error) is None


def test_the_plan_of_the_ranks_own_stage_and_what_needs_less() -> None:
    run = resolve_run(["experiment=moe_30b_8x64gb", "batch.micro=2", "recompute=none"], 8)
    fault = DeviceMemoryError("rank 6", "out of device memory: requested 1.00 GB", "x")
    output = explain(fault, run)
    assert "for stage 3 at its peak" in output.problem and "weights, gradients" in output.problem
    sizes = [float(size) for size in re.findall(r"planned: ([\d.]+) GB", output.fix)]
    assert len(sizes) >= 3 and sizes == sorted(sizes), output.fix
    assert all(
        overrides in output.fix for overrides in ("batch.micro=1", "recompute=all", "more ranks")
    )
    assert explain(output, run) is output
    host = HostMemoryError("rank 0", "out of host memory", "x")
    assert explain(host, run) is host


WORDS = [*FAULTY, "parallel.expert=2", "train.steps=2", "checkpoint.every=1"]
# Where, after how many steps begun, and steps in the checkpoints that stay.
PLACES = {
    "build": (0, []),
    "forward": (2, [1]),
    "backward": (2, [1]),
    "update": (2, [1]),
    "validation": (2, [1]),
    "before shards": (2, [1]),
}
LONG = {"backward", "update", "validation"}


@pytest.mark.world
@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.full] * (p in LONG)) for p in PLACES]
)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.full)])
def test_it_ends_as_such_wherever_it_happens(tmp_path: Path, place: str, victim: int) -> None:
    folder, log = tmp_path / "run", tmp_path / "ranks.log"
    step, checkpoints = PLACES[place]
    overrides = [*WORDS, *(["train.eval_every=2"] if place == "validation" else [])]
    outcomes = run_world(
        faulty,
        2,
        named(folder, overrides),
        str(notes(folder)),
        [Fault(place, step, victim, text=TORCH)],
        log=log,
        tolerate=True,
        # The run's own limit is 60 s: nobody waits for it.
        timeout=45,
    )
    codes, output = [one.value for one in outcomes], log.read_text()
    assert codes[victim] == EXIT_MEMORY, output
    # In a save all ranks agree on what happened; elsewhere the other one misses its peer.
    assert codes[1 - victim] == (EXIT_MEMORY if place == "before shards" else EXIT_HUNG)
    assert (
        output.count("moe_train: rank") == 1
        and f"moe_train: rank {victim}: out of device" in output
    )
    assert TOLD in output and "the plan has" in output and "recompute=all" in output
    assert "lost a peer" not in output and "Traceback" not in output
    status = read_status(folder / "status.json")
    assert status is not None and status.state == "failed"
    assert TOLD in status.reason and f"rank {victim}" in status.reason
    assert [p.name for p in sorted((folder / "checkpoints").glob("*"))] == [
        f"step_{number:08d}" for number in checkpoints
    ]


@pytest.mark.full
@pytest.mark.world
def test_a_load_that_runs_out_says_so_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "ranks.log"

    def start(*faults: Fault) -> list[Any]:
        overrides = named(folder, WORDS)
        return run_world(faulty, 2, overrides, str(notes(folder)), faults, log=log, tolerate=True)

    assert start(Fault("forward", 2, 1, text=TORCH))[1].value == EXIT_MEMORY
    (tmp_path / "run.faults").joinpath("done_0").unlink()
    assert start(Fault("load", 0, 1, text=TORCH))[1].value == EXIT_MEMORY
    assert log.read_text().count("moe_train: rank 1: out of device memory") == 2
    assert [one.value for one in start()] == [EXIT_FINISHED] * 2
    status = read_status(folder / "status.json")
    assert status is not None and (status.state, status.step) == ("finished", 2)


def fails_and_lingers(rank: int, world: int, phrases: list[str], folder: str) -> int:
    """As on NCCL: a rank fails, and nothing tells its peer, which waits in a collective."""
    from moe_train.backend import groups
    from moe_train.run import watchdog

    close, watchdog.PEER_EXIT_SECONDS = groups.close_world, 0.1

    def late(abort: bool = False) -> None:
        done = Path(folder) / "peer_ended"
        until = time.monotonic() + 200
        while rank == 1 and not done.exists() and time.monotonic() < until:
            time.sleep(0.05)
        close(abort)

    groups.close_world = late
    if rank == 0:
        exit_ = os._exit

        def seen(code: int) -> None:
            (Path(folder) / "peer_ended").write_text(str(code))
            exit_(code)

        os._exit = seen  # type: ignore[assignment]
    return faulty(rank, world, phrases, folder, [Fault("forward", 1, 1, text=TORCH)])


@pytest.mark.world
def test_a_peer_that_nobody_tells_is_ended_by_its_watchdog(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "ranks.log"
    overrides = named(folder, WORDS)
    outcomes = run_world(
        fails_and_lingers, 2, overrides, str(notes(folder)), log=log, tolerate=True, timeout=240
    )
    assert (notes(folder) / "peer_ended").read_text() == str(EXIT_HUNG)
    assert outcomes[1].value == EXIT_MEMORY
    output = log.read_text()
    assert output.count("moe_train: ") == 1 and TOLD in output
    status = read_status(folder / "status.json")
    assert status is not None and TOLD in status.reason


def test_a_command_ends_with_the_same_code() -> None:
    script = (
        "import sys, moe_train.cli as cli\n"
        "def full(argv): raise MemoryError\n"
        "cli.COMMANDS['plan'] = cli.Command('moe_train.commands.plan', 'plan_main', '', '')\n"
        "import moe_train.commands.plan as plan\n"
        "plan.plan_main = full\n"
        "sys.exit(cli.main(['plan']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == EXIT_MEMORY and "out of host memory" in done.stderr
    assert "Traceback" not in done.stderr

"""Worlds of ranks on this machine, forked from one server that has imported torch and Megatron.

Importing torch and Megatron costs seconds of CPU per rank; a fork costs milliseconds. Each
world is a set of fresh processes, so no state leaks from one test into the next.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moe_train.run.signals import SIGNALS

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["moe_train.testing.preload"])


class RankFailed(AssertionError):
    """A rank raised or died; the message holds the first failure's traceback."""


@dataclass
class Outcome:
    """Result of one rank."""

    value: Any = None
    failure: str = ""


def run_world(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 240.0,
    log: Path | None = None,
    tolerate: bool = False,
    unawaited: Sequence[int] = (),
) -> list[Any]:
    """Call ``function(rank, world, *args)`` on every rank and return the results by rank.

    The environment is torchrun's (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so the
    program's own entry points work inside.

    Args:
        function: importable by name.
        timeout: seconds for the whole world.
        log: file that receives the ranks' output; None discards it.
        tolerate: let the others end by themselves when a rank fails, and return every rank's
            :class:`Outcome` instead of raising.
        unawaited: ranks that will never end by themselves (with ``tolerate``): killed when the
            others have ended.

    Raises:
        RankFailed: a rank raised, died or did not end in time; the others are killed.
    """
    port, output = str(free_port()), str(log or os.devnull)
    arguments = [(rank, world, port, output, function, args) for rank in range(world)]
    with started(_CONTEXT, _rank, arguments) as connections:
        return _collect(connections, time.monotonic() + timeout, tolerate, unawaited)


@contextmanager
def started(
    context: Any, target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
) -> Iterator[list[Connection]]:
    """A process ``target(connection, *each)`` for each of ``arguments``, killed at the end.

    Args:
        context: of multiprocessing.

    Returns:
        The connections' other ends, from which results are received.
    """
    processes, connections = [], []
    for each in arguments:
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=target, args=(theirs, *each)))
        processes[-1].start()
        theirs.close()
        connections.append(ours)
    try:
        yield connections
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(
    connections: list[Connection], deadline: float, tolerate: bool, unawaited: Sequence[int]
) -> list[Any]:
    results: dict[int, Any] = {rank: Outcome(failure="not awaited") for rank in unawaited}
    pending = {c: rank for rank, c in enumerate(connections) if rank not in unawaited}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending.values())} did not end in time")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                outcome: Outcome = connection.recv()
            except EOFError:
                outcome = Outcome(failure="died without a result")
            if outcome.failure and not tolerate:
                raise RankFailed(f"rank {rank} failed:\n{outcome.failure}")
            results[rank] = outcome if tolerate else outcome.value
    return [results[rank] for rank in range(len(connections))]


def _rank(
    connection: Connection,
    rank: int,
    world: int,
    port: str,
    log: str,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    # Background jobs of a shell, and nohup, ignore some of these, and children inherit that: a rank
    # must not depend on how the tests were started.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        outcome = Outcome(value=function(rank, world, *args))
    except BaseException:  # noqa: BLE001  reported to the test that started this rank
        outcome = Outcome(failure=traceback.format_exc())
    connection.send(outcome)
    connection.close()
    sys.stdout.flush()
    # Skip interpreter teardown: gloo threads of a failed peer would hold it up.
    os._exit(0)


def free_port() -> int:
    """A port below the range that the system gives out by itself, which could take it again
    before rank 0 listens on it."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port

"""A process that imports everything once and forks the ranks of each case.

``python -m moe_train.rehearsal.server`` reads cases as JSON and writes reports as JSON. It has to
be started in :func:`moe_train.rehearsal.library.environment`, and never opens a device itself:
a process that has cannot fork ranks that do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from moe_train.rehearsal.library import GIGABYTE
from moe_train.rehearsal.rank import Case, RankReport, run_rank, to_json
from moe_train.testing.world import free_port, started

SECONDS = 240.0
"""For one case."""
FAREWELL = 20.0
"""For the other ranks of a case, once one has failed."""


def prepare() -> None:
    """Import torch, Megatron and the program, as the CUDA backend with torch's kernels does."""
    warnings.simplefilter("ignore")
    import torch

    from moe_train.backend import patches

    torch.set_num_threads(1)
    patches.apply_missing_te(lean=True)

    import moe_train.rehearsal.nccl
    import moe_train.run.training  # noqa: F401

    assert not torch.cuda.is_initialized()


def run_case(case: Case) -> list[RankReport]:
    """Fork the ranks of one case and collect their reports."""
    os.environ["MOE_TRAIN_REHEARSAL_DEVICES"] = str(case.world)
    os.environ["MOE_TRAIN_REHEARSAL_BYTES"] = str(int(case.memory_gb * GIGABYTE))
    available = case.memory_gb if case.available_gb is None else case.available_gb
    os.environ["MOE_TRAIN_REHEARSAL_AVAILABLE"] = str(int(available * GIGABYTE))
    port = free_port()
    arguments = [(case, rank, port) for rank in range(case.world)]
    reports = [RankReport(failure="did not end in time") for _ in arguments]
    until = time.monotonic() + SECONDS
    with started(multiprocessing.get_context("fork"), _rank, arguments) as connections:
        pending = {connection: rank for rank, connection in enumerate(connections)}
        while pending and (ready := wait(list(pending), until - time.monotonic())):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    reports[rank] = connection.recv()
                except EOFError:
                    reports[rank] = RankReport(failure="ended without a report")
                if reports[rank].code != 0:
                    until = min(until, time.monotonic() + FAREWELL)
    return reports


def _rank(connection: Connection, case: Case, rank: int, port: int) -> None:
    # The reports alone go to the server's output.
    os.dup2(2, 1)
    connection.send(run_rank(case, rank, port))
    connection.close()
    sys.stdout.flush()
    os._exit(0)


def serve(args: Path, answered: Path) -> None:
    """Run the cases of the first file, one after the other, and write their reports."""
    cases = [Case(**fields) for fields in json.loads(args.read_text())]
    prepare()
    reports: list[Sequence[RankReport]] = [run_case(case) for case in cases]
    answered.write_text(to_json(reports))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))

"""torchrun's environment: rank, world size, restarts, and the error file that it reports from."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def world_of_process() -> tuple[int, int]:
    """Rank and world size from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> tuple[int, int]:
    """How often torchrun has restarted these ranks, and its ``--max-restarts``."""
    done = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return done, int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def write_error_file(message: str) -> None:
    """Give torchrun the reason why this rank ends; without torchrun, do nothing.

    torchrun's final report quotes this file of the first rank that failed; without one it shows a
    link to a page on tracebacks, and the reason has scrolled away above it. The format is that of
    ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``, whose import would cost a
    refused run the seconds that torch takes.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    # torchrun shows the message only without a call stack, and fills in the exit code.
    record = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    # The reason is on stderr already; a failing exit must not fail because of its copy.
    with suppress(OSError), open(path, "w", encoding="utf-8") as stream:
        json.dump(record, stream)

"""status.json: state, step and reason of a run, for launchers and schedulers.

torchrun returns 1 for any failure, so the reason is read from this file.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from moe_train.errors import ConfigError
from moe_train.files import write_atomically

LOGGER = logging.getLogger(__name__)
State = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """One state of a run.

    Attributes:
        state: running | finished | preempted | failed.
        step: optimizer steps completed.
        reason: message; empty for running and finished.
    """

    state: State
    step: int
    reason: str = ""


def write_status(
    path: Path, state: State, step: int, reason: str = "", *, durable: bool = True
) -> None:
    """Replace the status file atomically; see :func:`write_atomically`.

    Raises:
        OSError: the file cannot be written.
    """
    assert state in get_args(State), state
    write_atomically(path, json.dumps(asdict(Status(state, step, reason))) + "\n", durable=durable)


def read_status(path: Path) -> Status | None:
    """The status of a run, or None where there is no such file yet or it was lost in a crash.

    The updates of a running run do not wait for the disk: after a crash of the node some file
    systems show an empty file, or one of zeros.

    Raises:
        ConfigError: the file is JSON that write_status did not write.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        _warn_lost(path)
        return None
    try:
        status = Status(result["state"], int(result["step"]), str(result.get("reason", "")))
        if status.state not in get_args(State):
            raise ValueError(status.state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            str(path), "is not a status file", "remove it, or choose another run.name"
        ) from error
    return status


@cache
def _warn_lost(path: Path) -> None:
    """Warn once for each file: a start of a run reads it more than once."""
    LOGGER.warning(
        "%s is empty or damaged, as after a crash of the node: the run counts as not finished", path
    )

"""status.json: state, step and reason of a run, for launchers and schedulers.

torchrun returns 1 for any failure, so the reason is read from this file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from moe_train.errors import ConfigError
from moe_train.files import write_atomically

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
    """The status of a run, or None where there is no such file yet.

    Raises:
        ConfigError: the file is not one that write_status wrote.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        result = json.loads(text)
        status = Status(result["state"], int(result["step"]), str(result.get("reason", "")))
        if status.state not in get_args(State):
            raise ValueError(status.state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            str(path), "is not a status file", "remove it, or choose another run.name"
        ) from error
    return status

"""Options that several commands share: ranks to plan for, files to write."""

from __future__ import annotations

import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_train.config.root import Config

STDOUT = Path("-")


def plan_world(world: int | None, config: Config | None) -> int:
    """The option ``--world``, or as many ranks as the sizes of `config` need.

    Args:
        config: None where it has errors; the default is then 8.

    Raises:
        ConfigError: there is no such number of ranks.
    """
    from moe_train.parallel.sizes import DEFAULT_WORLD, natural_world

    if world is None:
        return natural_world(config) if config else DEFAULT_WORLD
    if world < 1:
        raise ConfigError("--world", f"{world}: --world must be >= 1", "give 1 or more")
    return world


def check_imbalance(imbalance: float) -> None:
    """Refuse an ``--imbalance`` below 1.

    Raises:
        ConfigError: it is out of range.
    """
    if not 1 <= imbalance < inf:
        raise ConfigError("--imbalance", f"{imbalance:g}: --imbalance must be >= 1", "1.0 is even")


def console_for(json: Path | None) -> Console:
    """The console of a command: standard error where the JSON goes to standard output."""
    from rich.console import Console

    return Console(stderr=json == STDOUT)


def refuse_unwritable(option: str, path: Path | None) -> None:
    """Check, before minutes of work, that `option`'s file can be written.

    Raises:
        ConfigError: it cannot.
    """
    if path is None or path == STDOUT:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(option, f"cannot write to {path}", "give a writable file")


def write_text(option: str, path: Path, text: str) -> None:
    """Write the file of `option`, and print where it is; ``-`` is standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path == STDOUT:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(option, str(error), "give a writable file") from error
    print(f"written to {path}")

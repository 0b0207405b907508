"""Run folder: its name, the paths of its files, and its creation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from moe_train.errors import ConfigError
from moe_train.files import write_atomically
from moe_train.run_folder.status import read_status


@dataclass(frozen=True)
class RunFolder:
    """Where each part of a run lies; holds no open files, so every rank can have one."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration (YAML)."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Layout and parameter counts (JSON)."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One line a step (JSON lines)."""
        return self.path / "metrics.jsonl"

    @property
    def trace(self) -> Path:
        """One step of every rank (``train.trace``), for a trace viewer (JSON)."""
        return self.path / "trace.json"

    @property
    def status(self) -> Path:
        """What became of the run (JSON)."""
        return self.path / "status.json"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints, ``step_00000020`` each."""
        return self.path / "checkpoints"

    @property
    def experts(self) -> Path:
        """Expert utilisation."""
        return self.path / "experts"

    @property
    def tokens(self) -> Path:
        """Tokens of every layer's every expert, a line a step."""
        return self.experts / "tokens.jsonl"

    @property
    def logs(self) -> Path:
        """Log files of ranks and of W&B."""
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        """Weights & Biases' own files."""
        return self.path / "wandb"

    def rank_log(self, rank: int) -> Path:
        """Log file of one rank."""
        return self.logs / f"rank_{rank}.log"

    def write_config(self, mapping: Mapping[str, Any]) -> None:
        """Write the resolved configuration atomically, keys in their given order."""
        write_atomically(self.config, yaml.safe_dump(dict(mapping), sort_keys=False))


def create_run_folder(
    parent: str | Path,
    name: str | None,
    default_name: str,
    *,
    fresh: bool = False,
) -> RunFolder:
    """Create the folder of a run and its parts, or take up the one that is there.

    Only one rank may call this, and tells the others the path: the default name depends on what
    earlier runs left behind.

    Args:
        parent: ``run.dir``.
        name: ``run.name``; used as it is, so that naming a run again continues it.
        default_name: used where `name` is None: its folder is continued while unfinished, and a
            finished one is followed by ``-2``, ``-3``, ...
        fresh: with the default name, also pass over unfinished folders (``resume=never``).

    Raises:
        ConfigError: the name is not a folder name, or the folder cannot be written.
    """
    parent = Path(parent)
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ConfigError("run.name", f"{name!r} is not a folder name", "folders go to run.dir")
    try:
        path = run_folder_path(parent, name, default_name, fresh=fresh)
        folder = RunFolder(path)
        for part in (folder.checkpoints, folder.experts, folder.logs):
            part.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell about read-only mounts, quotas or a full disk: write.
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-") as probe:
            probe.write(b"moe_train")
            probe.flush()
    except OSError as error:
        raise ConfigError(
            "run.dir",
            f"{parent / (name or default_name)} cannot be written ({error.strerror})",
            "choose another with run.dir=FOLDER",
        ) from error
    return folder


def default_run_name(experiment: str, layout_tag: str) -> str:
    """Name of a run that was given none, such as ``twin-TP2.PP4.EP2``."""
    return f"{experiment}-{layout_tag}"


def run_folder_path(
    parent: str | Path, name: str | None, default_name: str, *, fresh: bool = False
) -> Path:
    """The folder that `create_run_folder` would take with the same arguments."""
    parent = Path(parent)
    return parent / (name or next_free_name(parent, default_name, fresh=fresh))


def next_free_name(parent: Path, base: str, *, fresh: bool = False) -> str:
    """The first of `base`, `base`-2, `base`-3, ... whose run is not finished (or not there)."""
    for number in count(1):
        name = base if number == 1 else f"{base}-{number}"
        folder = parent / name
        if not folder.exists():
            return name
        if fresh:
            continue
        status = read_status(RunFolder(folder).status)
        if status is None or status.state != "finished":
            return name
    raise AssertionError("count() does not end")

"""Config groups from files of the user: ``model=PATH`` beside ``model=NAME``."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from moe_train.config.files import read_yaml
from moe_train.errors import ConfigError


def is_path(option: str) -> bool:
    """Whether the value of a group names a file rather than one of its options."""
    return option.endswith((".yaml", ".yml"))


class GroupFiles(AbstractContextManager["GroupFiles"]):
    """A folder that Hydra searches for options of groups, with copies of the user's files.

    A copy holds plain data of a limited size: a list of defaults in it could name other files.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, group: str, path: Path) -> str:
        """Make a file an option of a group.

        Returns:
            The option's name.

        Raises:
            ConfigError: the file cannot be read, or holds no keys of the group.
        """
        content = read_yaml(path, group)
        if not isinstance(content, dict) or "defaults" in content:
            raise ConfigError(
                group, f"{path} is not a mapping of keys of {group}", "as configs/model/small.yaml"
            )
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moe-train-")
        name = "file"
        target = Path(self._folder.name) / group / f"{name}.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(content), encoding="utf-8")
        return name

    def overrides(self) -> list[str]:
        """Hydra's own override that makes it search the folder."""
        return [f"hydra.searchpath=['file://{self._folder.name}']"] if self._folder else []

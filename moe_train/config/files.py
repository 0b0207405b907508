"""YAML files from users: read as plain data of a limited size, or refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from moe_train.config.schema import rename_old_keys
from moe_train.errors import ConfigError

MAX_BYTES = 4 * 2**20


class _Loader(yaml.SafeLoader):
    """No tags that build objects, and no aliases: ten lines of them can mean gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"alias *{event.anchor} is refused: write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: Path, field: str) -> Any:
    """Content of a YAML file.

    Args:
        field: the option or key that named the file, for the message.

    Raises:
        ConfigError: not a regular file, too large, not YAML, or YAML beyond plain data.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            problem = f"{path} is not a regular file of at most {MAX_BYTES} bytes"
            raise ConfigError(field, problem, "give a YAML file")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(field, f"{path}: {error}", "give a readable YAML file") from error


def read_config(path: Path) -> dict[str, Any]:
    """The nested mapping in a run's ``config.yaml``, which an earlier version may have written.

    Raises:
        ConfigError: as `read_yaml`, or the file holds no mapping.
    """
    content = read_yaml(path, str(path))
    if not isinstance(content, dict):
        raise ConfigError(str(path), "is not a mapping of config keys", "restore it from a copy")
    return rename_old_keys(content)

"""YAML files that people hand in: plain data, of a sane size, or refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

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
        ConfigError: no plain file, too large, no YAML, or YAML that is more than plain data.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ConfigError(
                field, f"{path} is no plain file of at most {MAX_BYTES} bytes", "give a YAML file"
            )
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(field, f"{path}: {error}", "give a readable YAML file") from error

"""Secrets of the environment stay there: a config is written to files, logs and mirrors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_train.errors import ConfigError

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8
"""Characters; shorter values, such as 1 or true, would be found by chance."""


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables whose name says that their value is secret, by name; files are no secrets."""
    return {
        name: value
        for name, value in environment.items()
        if _NAME.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~"))
    }


def refuse_secrets(config: Mapping[Any, Any]) -> None:
    """Refuse a config of which a key or value holds a secret of the environment.

    Raises:
        ConfigError: names key and variable, never the value.
    """
    known = secrets(os.environ)
    if not known:
        return
    for key, text in _texts(config, ""):
        for name, value in known.items():
            if value in key or value in text:
                raise ConfigError(
                    key if value not in key else "config",
                    f"holds the secret value of the environment's {name}",
                    "leave it in the environment: configs are written to the run folder",
                )


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
    else:
        yield key, str(node)

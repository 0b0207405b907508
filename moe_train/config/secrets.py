"""Refusal of configs with secrets of the environment: configs are written to files and logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from moe_train.config.schema import walk
from moe_train.errors import ConfigError

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8
"""Characters; shorter values, such as 1 or true, would match by chance."""


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables whose name marks their value as secret, by name; paths are not secrets."""
    return {
        name: value
        for name, value in environment.items()
        if _NAME.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~"))
    }


def refuse_secrets(config: Mapping[Any, Any]) -> None:
    """Refuse a config of which a key or value contains a secret of the environment.

    Raises:
        ConfigError: names key and variable, never the value.
    """
    known = secrets(os.environ)
    for key, node in walk(config) if known else ():
        text = "" if isinstance(node, Mapping | list) else str(node)
        for name, value in known.items():
            if value in key or value in text:
                raise ConfigError(
                    key if value not in key else "config",
                    f"contains the secret value of the environment variable {name}",
                    "remove it: configs are written to the run folder",
                )

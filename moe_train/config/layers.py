"""Layer selections such as ``none``, ``all``, ``2-15`` or ``1,4-6``."""

from __future__ import annotations

import re

from moe_train.errors import ConfigError

_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def parse_layers(text: str, layers: int, field: str = "recompute.layers") -> tuple[int, ...]:
    """The 1-based layers that `text` selects out of `layers`, ascending.

    Raises:
        ConfigError: on bad syntax or a layer outside 1..layers.
    """
    if text == "none":
        return ()
    if text == "all":
        return tuple(range(1, layers + 1))
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.match(part.strip())
        if match is None:
            raise ConfigError(
                field,
                f"{text!r} is not a selection of layers",
                f"none, all, or 1-based ranges such as 2-{max(layers - 1, 2)} or '1,4-6'",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ConfigError(field, f"range {part.strip()} runs backwards", f"{last}-{first}")
        if first < 1 or last > layers:
            raise ConfigError(
                field,
                f"{part.strip()} names a layer outside 1-{layers}",
                f"model.layers={layers}: choose within 1-{layers}, none or all",
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))

"""Strict conversion between nested mappings and configuration dataclasses.

Nothing is guessed: a value is taken only if no information is lost (an int where a
float is asked, an integral float where an int is asked); a text is never parsed.
Faults are collected, not raised one by one, so that a user sees all of them at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from moe_train.errors import ConfigError


def key_of(field: dataclasses.Field[Any]) -> str:
    """Config key of a dataclass field: its metadata ``key`` if it has one, else its name."""
    return str(field.metadata.get("key", field.name))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def dotted_keys(cls: type, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key of `cls`, groups included, in declaration order."""
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        key, kind = prefix + key_of(field), _hints(cls)[field.name]
        keys.append(key)
        if dataclasses.is_dataclass(kind):
            keys.extend(dotted_keys(kind, key + "."))  # type: ignore[arg-type]
    return tuple(keys)


def nearest(name: str, known: tuple[str, ...] | list[str], count: int = 3) -> list[str]:
    """Names in `known` most like `name`, best first; a dotted name also by its last part."""
    # The group that a wrong key stands in is no suggestion.
    known = [key for key in known if not name.startswith(key + ".")]
    found = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    ratio = {key: difflib.SequenceMatcher(None, name, key).ratio() for key in found}
    found = [key for key in found if ratio[key] > ratio[found[0]] - 0.1]
    last = name.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for key in known:
        by_last.setdefault(key.rpartition(".")[2], key)
    for part in difflib.get_close_matches(last, list(by_last), n=count, cutoff=0.7):
        if by_last[part] not in found:
            found.append(by_last[part])
    return found[:count]


def unknown_key(key: str, known: tuple[str, ...] | list[str]) -> ConfigError:
    """The error for a key that does not exist, naming the nearest ones."""
    close = nearest(key, known)
    if close:
        return ConfigError(key, "unknown key", "did you mean " + " or ".join(close) + "?")
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    if not siblings:
        siblings = [k for k in known if "." not in k]
    return ConfigError(key, "unknown key", "known keys here: " + ", ".join(siblings))


def _with_article(kind: Any) -> str:
    name = _type_name(kind)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    args = get_args(kind)
    if get_origin(kind) in (types.UnionType, Union):
        return " or ".join(_type_name(a) for a in args)
    if get_origin(kind) is list:
        return f"list of {_type_name(args[0])}"
    if get_origin(kind) is dict:
        return f"mapping of {_type_name(args[0])} to {_type_name(args[1])}"
    return getattr(kind, "__name__", str(kind))


_REFUSED = object()


def _scalar(kind: Any, value: Any) -> Any:
    """`value` as `kind` if that loses nothing, else the refusal mark."""
    if kind is Any:
        return value
    if kind is type(None):
        return None if value is None else _REFUSED
    if isinstance(value, bool):
        return value if kind is bool else _REFUSED
    counted = isinstance(value, int) or (kind is int and isinstance(value, float))
    if counted and abs(value) >= 1 << 63:
        # Beyond any count; Python itself refuses to print or convert the largest.
        return _REFUSED
    if kind is float and isinstance(value, int | float):
        return float(value)
    if kind is int:
        if isinstance(value, int):
            return value
        return int(value) if isinstance(value, float) and value.is_integer() else _REFUSED
    if kind is str:
        # Hydra reads run.name=7 and recompute.layers=4 as numbers; decimal text is exact.
        return str(value) if isinstance(value, str | int) else _REFUSED
    return _REFUSED


def _value(kind: Any, value: Any, key: str, root: type, faults: list[ConfigError]) -> Any:
    """`value` converted to `kind`; on a fault it is reported and the mark returned."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object(kind, value, key + ".", root, faults)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        for option in args:
            trial: list[ConfigError] = []
            result = _value(option, value, key, root, trial)
            if result is not _REFUSED and not trial:
                return result
    elif origin is list and isinstance(value, list | tuple):
        items = [_value(args[0], v, f"{key}[{i}]", root, faults) for i, v in enumerate(value)]
        return _REFUSED if _REFUSED in items else items
    elif origin is dict and isinstance(value, Mapping):
        pairs = {
            _scalar(args[0], k): _value(args[1], v, f"{key}.{k}", root, faults)
            for k, v in value.items()
        }
        return _REFUSED if _REFUSED in pairs or _REFUSED in pairs.values() else pairs
    elif origin is None:
        result = _scalar(kind, value)
        if result is not _REFUSED:
            return result
    fix = f"give {_with_article(kind)}"
    if origin is list:
        fix += f", e.g. {key}=[{value}]" if isinstance(value, str) else f", e.g. {key}=[]"
    elif isinstance(value, str) and kind in (int, float, bool):
        fix += " without quotes"
    faults.append(ConfigError(key, f"{_shown(value)} is not {_with_article(kind)}", fix))
    return _REFUSED


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "an integer of thousands of digits"


def _object(cls: type, mapping: Any, prefix: str, root: type, faults: list[ConfigError]) -> Any:
    if not isinstance(mapping, Mapping):
        field = prefix.rstrip(".") or "config"
        below = ", ".join(k for k in dotted_keys(root) if k.startswith(prefix))
        faults.append(
            ConfigError(field, f"{mapping!r} is not a group of keys", f"set one of: {below}")
        )
        return cls()
    by_key = {key_of(f): f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        dotted = f"{prefix}{key}"
        if key not in by_key:
            faults.append(unknown_key(dotted, dotted_keys(root)))
            continue
        name = by_key[key].name
        result = _value(_hints(cls)[name], value, dotted, root, faults)
        if result is not _REFUSED:
            values[name] = result
    return cls(**values)


def from_mapping[T](cls: type[T], mapping: Mapping[str, Any]) -> tuple[T, list[ConfigError]]:
    """Build `cls` from a nested mapping, strictly.

    Args:
        cls: dataclass whose fields all have defaults.
        mapping: nested mapping with config keys (``global``, not ``global_``).

    Returns:
        The object, with defaults where a value was refused or absent, and every
        fault found (unknown keys, wrong types), empty when all is well.
    """
    faults: list[ConfigError] = []
    return _object(cls, mapping, "", cls, faults), faults


def to_mapping(obj: Any) -> dict[str, Any]:
    """Nested plain mapping of a configuration dataclass, keyed by config keys.

    ``from_mapping(type(obj), to_mapping(obj))`` gives an equal object.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {key_of(f): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    result = plain(obj)
    assert isinstance(result, dict)
    return result

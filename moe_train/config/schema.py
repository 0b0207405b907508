"""Conversion and validation of config mappings, key listing, key names of 0.1.

pydantic checks names, types and ranges. Its errors are collected and reported in our form: the
dotted key, what was expected, and the nearest legal value.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from moe_train.errors import ConfigError

OLD_KEYS = {
    "backend.host_threads": "backend.cpu_threads",  # 0.1
}
"""Keys of earlier versions and their present names, by which a ``config.yaml`` is read."""


def key_of(field: str) -> str:
    """Config key of a dataclass field: ``global`` for ``global_``, a keyword of Python."""
    return field.rstrip("_")


@cache
def _annotations(group: type) -> dict[str, Any]:
    return {key_of(n): kind for n, kind in get_type_hints(group, include_extras=True).items()}


@cache
def _adapter(root: type) -> TypeAdapter[Any]:
    return TypeAdapter(with_config(ConfigDict(extra="forbid", alias_generator=key_of))(root))


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str
    """Dotted, e.g. ``model.router.score``."""
    annotation: Any
    default: Any
    group: type
    """Dataclass that declares it."""

    @property
    def is_group(self) -> bool:
        """Whether further keys stand below it."""
        return dataclasses.is_dataclass(self.annotation)

    @property
    def is_number(self) -> bool:
        """Whether its values are integers or floats, or null."""
        return _main_type(self.annotation) in (int, float)

    @property
    def doc(self) -> str:
        """The string literal under the field, in one line; groups have none."""
        return " ".join(_docs(self.group).get(self.name.rpartition(".")[2], "").split())


@cache
def keys(root: type, prefix: str = "") -> tuple[Key, ...]:
    """Every key of `root`, groups included, in the order of declaration."""
    results: list[Key] = []
    for field in dataclasses.fields(root):
        kind, default = _annotations(root)[key_of(field.name)], getattr(root(), field.name)
        results.append(Key(prefix + key_of(field.name), kind, default, root))
        if results[-1].is_group:
            results.extend(keys(kind, results[-1].name + "."))
    return tuple(results)


def dotted_keys(root: type) -> tuple[str, ...]:
    """Names of `keys`."""
    return tuple(key.name for key in keys(root))


def _field(key: str) -> str:
    return key + "_" * (key == "global")


def value_at(config: Any, key: str) -> Any:
    """The value under a dotted key."""
    for name in key.split("."):
        config = getattr(config, _field(name))
    return config


def with_values[T](config: T, values: Mapping[str, Any]) -> T:
    """A copy of a config with other values under dotted keys; they are not checked."""
    for key, value in values.items():
        group, _, rest = key.partition(".")
        if rest:
            value = with_values(getattr(config, group), {rest: value})
        config = dataclasses.replace(config, **{_field(group): value})  # type: ignore[type-var]
    return config


def walk(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry below `node`; a list's items have the key of the list."""
    if isinstance(node, Mapping | list):
        pairs = node.items() if isinstance(node, Mapping) else (("", item) for item in node)
        for name, value in pairs:
            below = f"{key}.{name}".strip(".")
            yield below, value
            yield from walk(value, below)


@cache
def _docs(group: type) -> dict[str, str]:
    (node,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(node, ast.ClassDef)
    return {
        key_of(ast.unparse(field.target)): ast.literal_eval(text.value)
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def describe(annotation: Any) -> str:
    """A type in words: ``integer >= 1 or null``, ``one of cpu, cuda``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, Union):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is list:
        return f"list ({describe(args[0])})"
    if origin is dict:
        return f"mapping ({describe(args[0])}: {describe(args[1])})"
    if origin is Annotated:
        limits = [limit for extra in args[1:] for limit in getattr(extra, "metadata", ())]
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = [
            f" {sign} {getattr(limit, name)}"
            for name, sign in signs.items()
            for limit in limits
            if hasattr(limit, name)
        ]
        return describe(args[0]) + " and".join(bounds)
    if dataclasses.is_dataclass(annotation):
        return "group of keys"
    names = {int: "integer", float: "number", bool: "true or false", str: "string", Any: "value"}
    return names.get(annotation, "null")


def nearest(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Names in `known` most like `name`, best first; a dotted name also by its last part."""
    # The group that a wrong key stands in is no suggestion.
    known = [key for key in known if not name.startswith(key + ".")]
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    ratio = {key: difflib.SequenceMatcher(None, name, key).ratio() for key in close}
    close = [key for key in close if ratio[key] > ratio[close[0]] - 0.1]
    last = name.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for key in known:
        by_last.setdefault(key.rpartition(".")[2], key)
    for part in difflib.get_close_matches(last, list(by_last), n=count, cutoff=0.7):
        if by_last[part] not in close:
            close.append(by_last[part])
    return close[:count]


def unknown_key(key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist; names its successor or the nearest ones."""
    if key in OLD_KEYS:
        return ConfigError(key, "was renamed", f"set {OLD_KEYS[key]}")
    if close := nearest(key, known):
        return ConfigError(key, "unknown key", "did you mean " + " or ".join(close) + "?")
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    siblings = siblings or [k for k in known if "." not in k]
    return ConfigError(key, "unknown key", "known keys here: " + ", ".join(siblings))


def rename_old_keys(mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping of an earlier version's ``config.yaml`` under the present names of keys."""
    for old, new in OLD_KEYS.items():
        (group, name), (target, present) = old.split("."), new.split(".")
        if isinstance(mapping.get(group), dict) and name in mapping[group]:
            mapping.setdefault(target, {})[present] = mapping[group].pop(name)
    megatron = mapping.get("megatron")
    fields = megatron.get("transformer") if isinstance(megatron, dict) else None
    if isinstance(fields, dict) and "qk_layernorm" in fields:
        norm = "head" if fields.pop("qk_layernorm") else "none"
        mapping.setdefault("model", {}).setdefault("qk_norm", norm)
    return mapping


def from_mapping[T](root: type[T], mapping: Any) -> tuple[T, list[ConfigError]]:
    """Build a config dataclass from a nested mapping, strictly.

    Args:
        root: dataclass whose fields all have defaults.
        mapping: nested mapping with config keys (``global``, not ``global_``).

    Returns:
        The object, with defaults where a value was refused or absent, and every
        fault (unknown keys, wrong types, numbers out of range), empty when all is well.
    """
    faults: list[ConfigError] = []
    group: type = root
    while True:
        try:
            return _adapter(group).validate_python(mapping), faults
        except ValidationError as error:
            for each in error.errors(include_url=False):
                path, fault = _fault(root, each["type"], each["loc"], each["input"])
                faults.append(fault)
                mapping = _without(mapping, path)


def _fault(
    root: type, problem: str, location: tuple[str | int, ...], value: Any
) -> tuple[list[str | int], ConfigError]:
    """Path of the refused field, and the error that names what stands at `location` in it."""
    path: list[str | int] = []
    name, kind, above, in_groups = "", root, root, True
    for step in location:
        if step == "[key]":
            kind = get_args(above)[0]
            break
        above = _main_type(kind)
        is_group = dataclasses.is_dataclass(above)
        # A refused entry of a list or mapping refuses the whole field.
        in_groups = in_groups and is_group
        if in_groups:
            path.append(step)
        kind = _annotations(above).get(str(step), Any) if is_group else get_args(above)[-1]
        name += f"[{step}]" if get_origin(above) is list else f".{step}"
    name = name.lstrip(".")
    if problem in ("unexpected_keyword_argument", "invalid_key"):
        return path, unknown_key(name, dotted_keys(root))
    known = {key.name: key for key in keys(root)}
    main = _main_type(kind)
    if dataclasses.is_dataclass(main):
        below = [key for key in known if key.startswith(name + "." * bool(name))]
        fix = "set one of: " + ", ".join(below)
    elif get_origin(main) is Literal and (close := nearest(str(value), get_args(main), 1)):
        fix = f"did you mean {close[0]}?"
    elif get_origin(main) is list and isinstance(value, str):
        fix = f"write {name}=[{value}]"
    else:
        fix = f"default: {json.dumps(known['.'.join(map(str, path))].default)}"
    try:
        given = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        given = "an integer of thousands of digits"
    return path, ConfigError(name or "config", f"expected {describe(kind)}, got {given}", fix)


def _main_type(annotation: Any) -> Any:
    """The type without its bounds and without null."""
    if get_origin(annotation) in (types.UnionType, Union, Annotated):
        return _main_type(get_args(annotation)[0])
    return annotation


def _without(mapping: Any, path: Sequence[str | int]) -> dict[Any, Any]:
    """A copy of a nested mapping without the key at `path`."""
    if not path:
        return {}
    head, *rest = path
    if rest:
        return {**mapping, head: _without(mapping[head], rest)}
    return {key: value for key, value in mapping.items() if key != head}


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain mapping of a config dataclass; ``from_mapping`` gives an equal object again."""
    group: type = type(config)
    mapping: dict[str, Any] = _adapter(group).dump_python(config, by_alias=True, warnings=False)
    return mapping

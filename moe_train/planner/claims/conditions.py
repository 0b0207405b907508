"""What conditions of verdicts ask of config keys, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Needs = dict[str, str | tuple[int, int]]
"""Of each config key a value, as an override writes it, or a range of integers."""


def needs_of(overrides: Sequence[str]) -> Needs:
    """What overrides ask for; ``world=N`` counts as a key."""
    return {key: value for key, _, value in (one.partition("=") for one in overrides)}


def joined(several: Iterable[Needs]) -> Needs:
    """What conditions that do not exclude each other ask for together."""
    merged: Needs = {}
    for needs in several:
        for key, value in needs.items():
            known = merged.get(key, value)
            if isinstance(known, tuple) and isinstance(value, tuple):
                value = max(known[0], value[0]), min(known[1], value[1])
            merged[key] = known if isinstance(known, str) else value
    return merged


def exclusive(mine: Needs, theirs: Needs) -> list[str]:
    """Keys of which the two ask for values that cannot be had together."""
    return [key for key, value in mine.items() if key in theirs and _excluded(value, theirs[key])]


def _excluded(mine: str | tuple[int, int], theirs: str | tuple[int, int]) -> bool:
    if isinstance(mine, str) and isinstance(theirs, str):
        return mine != theirs
    ranges = []
    for one in (mine, theirs):
        if isinstance(one, str):
            if not one.lstrip("-").isdigit():
                return True
            one = (int(one), int(one))
        ranges.append(one)
    (low, high), (least, most) = ranges
    return low > most or least > high


def with_exclusions(needs: Mapping[str, Needs]) -> dict[str, tuple[str, ...]]:
    """Of each claim the claims whose conditions exclude its own; those with any."""
    apart = {
        name: tuple(
            other for other, theirs in needs.items() if other != name and exclusive(mine, theirs)
        )
        for name, mine in needs.items()
    }
    return {name: others for name, others in apart.items() if others}

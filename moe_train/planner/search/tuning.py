"""What ``moe-train tune`` reports: the best layouts, what separates them, the layout asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.config.compose import collect, override_keys
from moe_train.config.hardware import MachineFacts
from moe_train.config.root import Config
from moe_train.config.schema import value_at
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.planner.cost.timing import step_time
from moe_train.planner.machine.experiment import with_device
from moe_train.planner.memory.fit import lighter
from moe_train.planner.memory.stages import GB
from moe_train.planner.plan import BAND, Plan, assumptions_of
from moe_train.planner.resolution import resolve_run
from moe_train.planner.search.best import search_of
from moe_train.planner.search.candidate import COMFORT, OPTIONS, Candidate, bytes_needed, frontier
from moe_train.planner.search.space import SIZES
from moe_train.planner.search.terms import separation, step_terms

VERSION = 1
"""Of the report's fields."""
GROWTH = (2, 4, 8, 16)
"""Multiples of the ranks that are tried where nothing fits."""


@dataclass(frozen=True)
class Tuning:
    """The result of a search for a user.

    Args:
        base: the config that the overrides compose, to which candidates' overrides are added.
        requested: the plan that it asks for; None where that is refused.
        refusal: why it is refused.
        fixed: keys that kept their values.
        top: the best candidates, one of each layout.
        pareto: time against memory, the fastest first.
        remedies: what would make the model fit, where nothing does.
    """

    base: Config
    world: int
    requested: Plan | None
    refusal: str
    fixed: tuple[str, ...]
    top: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]
    remedies: tuple[str, ...]

    def report(self, shown: int | None = None) -> dict[str, Any]:
        """The same as plain data; bytes, seconds, shares.

        Args:
            shown: candidates in ``top``; None for all.
        """
        first = self.top[0]
        return {
            "version": VERSION,
            "world": self.world,
            "hardware": first.config.hardware.name,
            "model": first.config.model.name,
            "tokens_per_step": first.plan.tokens,
            "band": BAND,
            "preferred_memory_share": COMFORT,
            "fixed": list(self.fixed),
            "fits": first.fits,
            "requested": self._requested(first),
            "top": [self._row(one, first) for one in self.top[:shown]],
            "pareto": [self._row(one, first) for one in self.pareto],
            "remedies": list(self.remedies),
        }

    def _row(self, one: Candidate, first: Candidate) -> dict[str, Any]:
        terms = step_terms(one.plan, one.time)
        apart = separation(one.plan, terms, first.plan, step_terms(first.plan, first.time))
        config = one.config
        return {
            "layout": one.layout.tag,
            "overrides": one.overrides(self.base),
            "options": {key: value_at(config, key) for key in OPTIONS},
            "step_seconds": one.seconds,
            "step_seconds_band": [one.seconds * (1 - BAND), one.seconds * (1 + BAND)],
            "tokens_per_second": one.tokens_per_second,
            "mfu": one.time.mfu,
            "memory_bytes": one.bytes,
            "memory_share": one.share,
            "margin": one.margin,
            "fits": one.fits,
            "equal_within_band": one.seconds * (1 - BAND) <= first.seconds,
            "behind_seconds": one.seconds - first.seconds,
            "separated_by": {"term": apart.term, "seconds": apart.seconds},
            "terms": terms,
        }

    def _requested(self, first: Candidate) -> dict[str, Any]:
        if self.requested is None:
            return {"layout": None, "verdict": "refused", "reason": self.refusal}
        plan = self.requested
        one = Candidate(plan, step_time(plan).step, bytes_needed(plan))
        by = "parallel=auto" if self.base.parallel.auto else "the overrides"
        row = self._row(one, first)
        return {"chosen_by": by, **row, **_verdict(one, first, row["separated_by"])}


def _verdict(one: Candidate, first: Candidate, apart: dict[str, Any]) -> dict[str, str]:
    need = f"{one.bytes / GB:.1f} of {one.plan.device_bytes / GB:g} GB"
    if not one.fits:
        return {"verdict": "does not fit", "reason": f"needs {need} a device"}
    if one.plan.config == first.config:
        return {"verdict": "first", "reason": "it is the first choice"}
    if one.seconds * (1 - BAND) <= first.seconds:
        why = "equal within the band of the predictions"
        return {"verdict": "equal", "reason": why}
    more = one.seconds - first.seconds
    return {
        "verdict": "slower",
        "reason": f"{more:.3g} s a step slower ({one.seconds / first.seconds:.2f} x); most of it: "
        f"{apart['seconds']:+.3g} s {apart['term']}",
    }


def fixed_keys(overrides: Sequence[str]) -> tuple[str, ...]:
    """Searched keys that the overrides set one by one; groups are where a search starts."""
    searched = {*OPTIONS, *(f"parallel.{name}" for name in SIZES)}
    return tuple(sorted(searched & override_keys(overrides)))


def tune(
    overrides: Sequence[str],
    world: int,
    *,
    count: int = 5,
    imbalance: float | None = None,
    facts: MachineFacts | None = None,
) -> Tuning:
    """Search layouts and options for what `overrides` compose, on `world` ranks.

    Args:
        count: layouts in `Tuning.top`.
        imbalance: rows of the busiest rank's experts over the average; None assumes the default.
        facts: as in `resolve_run`.

    Raises:
        ConfigFaults: a value is refused whatever the layout, or nothing is legal.
    """
    base, faults = collect(overrides)
    if faults:
        raise ConfigFaults(faults)
    fixed, refusal, requested = fixed_keys(overrides), "", None
    try:
        requested = Plan.of(resolve_run(overrides, world, facts))
        config = requested.config
    except ConfigFaults as error:
        fault, refusal = error, str(error)
        config = with_device(base, base.hardware.kind)
    assumptions = None
    if imbalance is not None:
        assumptions = assumptions_of(config, imbalance, memory_imbalance=imbalance)
        requested = requested and Plan.of(requested, assumptions)
    search = search_of(config, world, fixed, assumptions)
    results = search.explore(count, pareto=True)
    top = results.ranked or search.smallest(count)
    if not top:
        raise fault if refusal else ConfigError(
            "parallel", f"nothing is legal on {world} ranks with {', '.join(fixed)}",
            "leave some of these keys to the search",
        )  # fmt: skip
    return Tuning(
        base,
        world,
        requested,
        refusal,
        fixed,
        tuple(top),
        tuple(frontier(results.frontier)),
        tuple(_remedies(top[0], fixed)) if not top[0].fits else (),
    )


def _remedies(smallest: Candidate, fixed: Collection[str]) -> list[str]:
    """What would make the model fit: less state, more ranks, larger devices."""
    plan, device = smallest.plan, smallest.plan.device_bytes
    lines = [
        f"{overrides}: {size / GB:.1f} GB" for overrides, size in lighter(plan) if size <= device
    ]
    for factor in GROWTH:
        world = factor * plan.layout.world
        more = search_of(plan.config, world, fixed, plan.assumptions).explore(1).ranked
        if more:
            lines.append(
                f"{world} ranks ({more[0].layout.tag}: {more[0].bytes / GB:.1f} GB each, "
                f"{more[0].seconds:.3g} s a step)"
            )
            break
    lines.append(f"devices of {smallest.bytes / COMFORT / GB:.0f} GB (hardware=...)")
    return lines

"""The choice behind ``experiment=auto``: the largest experiment that the devices hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moe_train.config.compose import collect
from moe_train.config.hardware import MachineFacts
from moe_train.config.root import AUTO, Config
from moe_train.errors import ConfigError
from moe_train.parallel.sizes import layout_of
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.legality import check
from moe_train.planner.machine.profiles import as_found, overridden, profile_overrides
from moe_train.planner.memory.fit import assumptions_of
from moe_train.planner.memory.stages import GB, plan_memory, worst
from moe_train.planner.search import resolve

LAST = "twin"
"""Taken where nothing else is legal and fits."""
CANDIDATES = (
    "moe_30b_32x64gb",
    "moe_30b_8x64gb",
    "gpu_3b",
    "gpu_1b",
    "gpu_300m",
)
"""Experiments for GPUs, the most demanding first."""
SHARE = 0.9
"""Share of a device's memory that an automatic choice may need: communicators, kernels' workspaces
and fragments of the allocator, which the formulas leave out, take the rest."""


def on_device(config: Config, facts: MachineFacts) -> Config:
    """`config` with its device decided."""
    if config.device != "auto":
        return config
    return dataclasses.replace(config, device="cpu" if facts.kind == "cpu" else "cuda")


def needed_gb(name: str, facts: MachineFacts) -> float | None:
    """GB that an experiment needs on the fullest rank; None where it cannot run on these ranks.

    The larger of the two kernel sets' needs: which of them runs is not known before torch is.
    """
    config, faults = collect([f"experiment={name}", *profile_overrides((), facts)])
    config.hardware = as_found(config.hardware, (), facts)
    config = resolve_with_batch(on_device(config, facts), facts.count)
    known = config.hardware.peak_tflops
    if faults or config.dtype not in known or check(config, facts.count, here=True):
        return None
    layout, assumed = layout_of(config, facts.count), assumptions_of(config)
    vocab = vocabulary(config)[0]
    return (
        max(
            worst(
                plan_memory(config, layout, vocab, dataclasses.replace(assumed, fused=fused))
            ).total
            for fused in (True, False)
        )
        / GB
    )


def choose(facts: MachineFacts) -> tuple[str, str]:
    """Experiment name and the reason, one sentence, for a machine."""
    if facts.kind == "cpu":
        return LAST, "no accelerator: the 30B's topology with small widths"
    size = f"{facts.count} device{'s' * (facts.count > 1)} of {facts.memory_gb:.0f} GB"
    if facts.device:
        size += f" ({facts.device})"
    passed: list[str] = []
    for name in CANDIDATES:
        need = needed_gb(name, facts)
        if need is None:
            continue
        if need <= SHARE * facts.memory_gb:
            before = f"; {passed[-1]}" if passed else ""
            return name, f"{size}: {name} needs {need:.0f} GB of each{before}"
        passed.append(f"{name} would need {need:.0f} GB")
    return LAST, f"{size}: {passed[-1] if passed else 'no larger experiment runs on them'}"


def resolve_with_batch(config: Config, world: int) -> Config:
    """As `resolve`, with the ``batch.global`` nearest to its own that the replicas can share.

    The layout is chosen as if the batch were open: three replicas are better than three stages.
    """
    batch, wanted = config.batch, config.batch.global_
    if wanted is None:
        return resolve(config, world)
    config = resolve(
        dataclasses.replace(config, batch=dataclasses.replace(batch, global_=None)), world
    )
    unit = max(1, batch.micro * layout_of(config, world).data)
    near = max(1, round(wanted / unit)) * unit
    return dataclasses.replace(config, batch=dataclasses.replace(batch, global_=near))


def collect_on(
    overrides: Sequence[str],
    facts: MachineFacts,
    first: tuple[Config, list[ConfigError]] | None = None,
) -> tuple[Config, list[ConfigError], bool]:
    """As `moe_train.config.compose.collect`, on a machine: device, profile, experiment decided.

    The config's `experiment` and `experiment_reason` name the choice and its reason. Values that
    the user overrides win over the chosen experiment's and profile's.

    Args:
        first: ``collect(overrides)``, where it is there already.

    Returns:
        The config, the faults of form, and whether experiment=auto chose.
    """
    profile = profile_overrides(overrides, facts)
    config, faults = first if first and not profile else collect([*profile, *overrides])
    # A name that does not exist stands at auto too, and is not the machine's to replace.
    chosen = config.experiment == AUTO and not any(f.field == "experiment" for f in faults)
    if chosen:
        name, reason = choose(facts)
        rest = [o for o in overrides if o.partition("=")[0].lstrip("+") != "experiment"]
        config, faults = collect([f"experiment={name}", *profile, *rest])
        config.experiment_reason = f"auto: {reason}"
    config.hardware = as_found(config.hardware, overrides, facts)
    return on_device(config, facts), faults, chosen


def batch_is_open(overrides: Sequence[str]) -> bool:
    """Whether the user leaves the batch to the chosen experiment."""
    return not any(key == "batch" or key.startswith("batch.") for key in overridden(overrides))

"""``experiment=auto``: the largest experiment that fits the devices' memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_train.config.compose import collect, for_own_model, override_keys
from moe_train.config.hardware import MachineFacts
from moe_train.config.root import AUTO, Config
from moe_train.errors import ConfigError
from moe_train.parallel.resolved import resolved_run
from moe_train.parallel.sizes import layout_of
from moe_train.planner.legality import check
from moe_train.planner.machine.profiles import profile_overrides, with_device_figures
from moe_train.planner.memory.stages import GB, plan_memory, worst
from moe_train.planner.plan import Plan
from moe_train.planner.search.automatic import resolve

FALLBACK = "twin"
"""Chosen if no other experiment is legal and fits."""
CANDIDATES = (
    "moe_30b_32x64gb",
    "moe_30b_8x64gb",
    "gpu_3b",
    "gpu_1b",
    "gpu_300m",
)
"""Experiments for GPUs, the most demanding first."""


def with_device(config: Config, kind: str) -> Config:
    """`config` with ``device=auto`` decided: cpu where `kind` is ``cpu``, else cuda.

    Args:
        kind: of the machine that a run starts on, or of the hardware profile that a plan is for,
            wherever that plan is computed.
    """
    if config.device != AUTO:
        return config
    return replace(config, device="cpu" if kind == "cpu" else "cuda")


def on_machine(config: Config, overrides: Sequence[str], facts: MachineFacts) -> Config:
    """`config` with the machine's device, if it is open, and the devices' own figures."""
    config = with_device(config, facts.kind)
    return replace(config, hardware=with_device_figures(config.hardware, overrides, facts))


def memory_needed_gb(name: str, facts: MachineFacts) -> float | None:
    """GB that an experiment needs on the fullest rank, allowances included; None if it cannot run.

    The larger need of the two kernel sets: which of them runs is known only with torch.
    """
    config, faults = collect([f"experiment={name}", *profile_overrides((), facts)])
    config = on_machine(config, (), facts)
    config = resolve_layout_and_batch(config, facts.count)
    known = config.hardware.peak_tflops
    if faults or config.dtype not in known or check(config, facts.count, here=True):
        return None
    plan = Plan.of(resolved_run(config, facts.count))
    plans = (replace(plan, assumptions=replace(plan.assumptions, fused=f)) for f in (True, False))
    return max(worst(plan_memory(one)).total for one in plans) / GB


def choose_experiment(facts: MachineFacts) -> tuple[str, str]:
    """Name of the experiment for a machine, and the reason in one sentence."""
    if facts.kind == "cpu":
        return FALLBACK, "no accelerator: the 30B's topology with small widths"
    size = f"{facts.count} device{'s' * (facts.count > 1)} of {facts.memory_gb:.0f} GB"
    if facts.device:
        size += f" ({facts.device})"
    passed: list[str] = []
    for name in CANDIDATES:
        need = memory_needed_gb(name, facts)
        if need is None:
            continue
        if need <= facts.memory_gb:
            before = f"; {passed[-1]}" if passed else ""
            return name, f"{size}: {name} needs {need:.0f} GB of each{before}"
        passed.append(f"{name} would need {need:.0f} GB")
    return FALLBACK, f"{size}: {passed[-1] if passed else 'no larger experiment runs on them'}"


def resolve_layout_and_batch(config: Config, world: int) -> Config:
    """As `resolve`, with ``batch.global`` rounded to a multiple that the replicas can share.

    The layout is chosen as if the batch were open: three replicas are better than three stages.
    """
    batch, wanted = config.batch, config.batch.global_
    if wanted is None:
        return resolve(config, world)
    config = resolve(replace(config, batch=replace(batch, global_=None)), world)
    unit = max(1, batch.micro * layout_of(config, world).data)
    nearest = max(1, round(wanted / unit)) * unit
    return replace(config, batch=replace(batch, global_=nearest))


def compose_for_machine(
    overrides: Sequence[str],
    facts: MachineFacts,
    composed: tuple[Config, list[ConfigError]] | None = None,
) -> tuple[Config, list[ConfigError], bool]:
    """As `moe_train.config.compose.collect`, with device, hardware profile, experiment chosen.

    The config's `experiment` and `experiment_reason` name the choice and its reason. Overrides win
    over the values of the chosen experiment and profile.

    Args:
        composed: ``collect(overrides)``, if the caller has it already.

    Returns:
        The config, the faults of form, and whether experiment=auto chose.
    """
    profile = profile_overrides(overrides, facts)
    config, faults = composed if composed and not profile else collect([*profile, *overrides])
    # An experiment that does not exist is left at auto as well, and must not be replaced.
    chosen = config.experiment == AUTO and not any(f.field == "experiment" for f in faults)
    if chosen:
        name, reason = choose_experiment(facts)
        rest = [o for o in overrides if o.partition("=")[0].lstrip("+") != "experiment"]
        config, faults = collect([f"experiment={name}", *profile, *for_own_model(overrides), *rest])
        config = replace(config, experiment_reason=f"auto: {reason}")
    return on_machine(config, overrides, facts), faults, chosen


def leaves_batch_open(overrides: Sequence[str]) -> bool:
    """Whether the user leaves the batch to the chosen experiment."""
    return not any(key == "batch" or key.startswith("batch.") for key in override_keys(overrides))

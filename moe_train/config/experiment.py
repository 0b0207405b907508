"""The choice behind ``experiment=auto``: the 30B where the machine fits it, else the twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.config.compose import collect
from moe_train.config.root import Config
from moe_train.config.validate import validate
from moe_train.errors import ConfigError, ConfigFaults

AUTO = "auto"
NEEDED_GB = 60.0
"""Least device memory in GB (1e9 bytes) for the 30B on 8 ranks: 45.8 GB of weights,
gradients and optimizer state, plus activations and buffers; 64 GB parts pass."""


@dataclass(frozen=True)
class MachineFacts:
    """What the caller found: device kind (cpu or an accelerator), ranks and memory.

    `count` is the number of ranks, each with a device of its own; `memory_gb` the
    memory of the smallest device in GB (1e9 bytes).
    """

    kind: str
    count: int
    memory_gb: float


def choose(facts: MachineFacts) -> tuple[str, str]:
    """Experiment name and the reason, one sentence, for a machine."""
    if facts.kind == "cpu":
        return "twin", "no accelerator: the 30B's topology with small widths"
    size = f"{facts.count} devices of {facts.memory_gb:.0f} GB"
    if facts.memory_gb < NEEDED_GB:
        return "twin", f"{size}: the 30B needs {NEEDED_GB:.0f} GB a device"
    if facts.count == 32:
        return "moe_30b_32x64gb", f"{size}: fit EP8 TP2 PP4 on 32 ranks"
    if facts.count >= 8 and facts.count % 8 == 0:
        return "moe_30b_8x64gb", f"{size}: fit the 30B"
    return "twin", f"{size}: the 30B needs 8, or a multiple"


def collect_for(overrides: Sequence[str], facts: MachineFacts) -> tuple[Config, list[ConfigError]]:
    """As `moe_train.config.compose.collect`, with experiment=auto chosen from `facts`.

    The returned config's `experiment` and `experiment_reason` say what was chosen and
    why. Values that the user overrides still win over the chosen experiment's.
    """
    config, faults = collect(overrides)
    # A name that does not exist stands at auto too, and is not the machine's to replace.
    if config.experiment != AUTO or any(fault.field == "experiment" for fault in faults):
        return config, faults
    name, reason = choose(facts)
    rest = [o for o in overrides if o.partition("=")[0].lstrip("+") != "experiment"]
    config, faults = collect([f"experiment={name}", *rest])
    config.experiment_reason = f"auto: {reason}"
    return config, faults


def compose_for(overrides: Sequence[str], facts: MachineFacts) -> Config:
    """The composed config of a run on a machine, experiment=auto chosen.

    Raises:
        ConfigFaults: all faults together, as `moe_train.config.compose.compose`.
    """
    config, faults = collect_for(overrides, facts)
    faults.extend(validate(config))
    if faults:
        raise ConfigFaults(faults)
    return config

"""From overrides to a config that is known to be legal on a world, or every fault of it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.compose import collect
from moe_train.config.environment import settled
from moe_train.config.experiment import AUTO, MachineFacts
from moe_train.config.ranges import sizes_refused
from moe_train.config.root import Config
from moe_train.config.validate import single_faults, validate
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.parallel.layout import Layout
from moe_train.planner.legality import check
from moe_train.planner.machine.choice import batch_is_open, collect_on, resolve_with_batch
from moe_train.planner.search import planned, resolve


def prepare(
    overrides: Sequence[str],
    world: int,
    facts: MachineFacts | None = None,
    first: tuple[Config, list[ConfigError]] | None = None,
) -> tuple[Config, Layout]:
    """Compose, choose device, profile and experiment, and check them for `world` ranks.

    Args:
        overrides: Hydra overrides.
        world: number of ranks.
        facts: the machine, from which device=auto, experiment=auto and the hardware profile are
            decided; None leaves them as configured (auto then has the twin's values). A CPU
            brings its own rules, as ``device=cpu`` does.
        first: ``collect(overrides)``, where it is there already.

    Returns:
        The config with every parallel size and environment setting filled in, and its layout.

    Raises:
        ConfigFaults: every fault of form, value, layout and machine together.
    """
    chosen = False
    if facts is None:
        config, faults = collect(overrides)
    else:
        config, faults, chosen = collect_on(overrides, facts, first)
    refused = {fault.field for fault in faults}
    if not sizes_refused([*faults, *validate(config)]):
        open_batch = chosen and batch_is_open(overrides)
        config = settled((resolve_with_batch if open_batch else resolve)(config, world))
    # A refused value stands at its default, which is not the user's to answer for.
    # The GPUs that a run is chosen for are this machine's, and so are its kernels.
    here = facts is not None and facts.kind != "cpu"
    found = check(config, world, here=here)
    faults.extend(fault for fault in found if fault.field not in refused)
    if config.hardware.device and "dtype" not in refused:
        faults.extend(dtype_faults(config))
    if faults:
        raise ConfigFaults(faults)
    return config, planned(config, world)


def certain_faults(overrides: Sequence[str], world: int) -> list[ConfigError]:
    """Faults that stand whatever the devices of the ranks are; empty where there may be none.

    With experiment=auto these are faults of form and of single values, since the devices choose
    the rest.

    Raises:
        ConfigFaults: Hydra cannot merge at all.
    """
    config, faults = collect(overrides)
    refused = {fault.field for fault in faults}
    if config.experiment == AUTO:
        found = single_faults(config)
    else:
        if not sizes_refused([*faults, *validate(config)]):
            config = resolve(config, world)
        found = check(config, world)
    return [*faults, *(fault for fault in found if fault.field not in refused)]


def dtype_faults(config: Config) -> list[ConfigError]:
    """What an accelerator's profile says against the compute dtype."""
    hardware = config.hardware
    if hardware.kind != "accelerator" or config.dtype in hardware.peak_tflops:
        return []
    return [
        ConfigError(
            "dtype",
            f"{hardware.name} has no {config.dtype}",
            f"one of {', '.join(hardware.peak_tflops)}, or another hardware profile",
        )
    ]

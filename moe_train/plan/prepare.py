"""From overrides to a config that is known to be legal on a world, or every fault of it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.compose import collect
from moe_train.config.environment import settled
from moe_train.config.experiment import MachineFacts, collect_for
from moe_train.config.ranges import sizes_refused
from moe_train.config.root import Config
from moe_train.config.validate import validate
from moe_train.errors import ConfigFaults
from moe_train.plan.layouts.layout import Layout
from moe_train.plan.layouts.machine import accelerator_present
from moe_train.plan.legality.check import check
from moe_train.plan.legality.search import planned, resolve


def prepare(
    overrides: Sequence[str], world: int, facts: MachineFacts | None = None
) -> tuple[Config, Layout]:
    """Compose, choose experiment and layout, and check them for `world` ranks.

    Args:
        overrides: Hydra overrides.
        world: number of ranks.
        facts: the machine, from which experiment=auto is chosen; None leaves it auto
            (which then has the twin's values). A machine that certainly has no GPU brings
            the host's own rules, as ``device=cpu`` does.

    Returns:
        The config with every parallel size and environment setting filled in, and its layout.

    Raises:
        ConfigFaults: every fault of form, value, layout and machine together.
    """
    config, faults = collect(overrides) if facts is None else collect_for(overrides, facts)
    refused = {fault.field for fault in faults}
    if not sizes_refused([*faults, *validate(config)]):
        config = settled(resolve(config, world))
    # A refused value stands at its default, which is not the user's to answer for.
    on_host = config.device == "cpu" or (
        config.device == "auto"
        and facts is not None
        and facts.kind == "cpu"
        and not accelerator_present()
    )
    # The GPUs that a run is chosen for are this machine's, and so are its kernels.
    here = facts is not None and facts.kind != "cpu"
    found = check(config, world, host=on_host, here=here)
    faults.extend(fault for fault in found if fault.field not in refused)
    if faults:
        raise ConfigFaults(faults)
    return config, planned(config, world)

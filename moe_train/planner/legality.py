"""`check`: every rule that a config violates on a world of ranks, with the nearest layouts."""

from __future__ import annotations

from moe_train.config.kernels import expected_kernels
from moe_train.config.root import Config
from moe_train.config.validate import sizes_refused, validate
from moe_train.errors import ConfigError
from moe_train.parallel.kernel_rules import fp8_faults, kernel_options, kernel_sizes
from moe_train.parallel.layout import Layout
from moe_train.parallel.rules import WORLD_SIZE, layout_faults
from moe_train.parallel.sizes import layout_of, nearest_layouts
from moe_train.planner.ranking import ranked


def check(config: Config, world: int, *, here: bool = False) -> list[ConfigError]:
    """Every violated rule of `config` on `world` ranks; empty when it can run.

    Null parallel sizes count as `moe_train.parallel.sizes.layout_of` fills them; resolve
    ``parallel.auto`` first (`moe_train.planner.search.automatic.resolve`). ``device=auto``, which
    callers decide where they know the devices, passes for GPUs.

    Args:
        here: whether it will run on this machine's own GPUs, with the kernels installed here.
    """
    on_cpu = config.device == "cpu"
    kernels = expected_kernels(config.backend.kernels, on_cpu=on_cpu, here=here).kernels
    faults = [*validate(config), *kernel_options(config, kernels, on_cpu)]
    if (tag := config.parallel.reference) and Layout.from_tag(tag) is None:
        faults.append(
            ConfigError(
                "parallel.reference", f"{tag!r} is no layout", "for example TP2.PP4.EP8.span"
            )
        )
    if sizes_refused(faults):
        return faults
    layout = layout_of(config, world)
    violated = [_with_legal_layouts(f, config, layout) for f in layout_faults(config, layout)]
    refused = {fault.field for fault in (*faults, *violated)}
    machine = [*kernel_sizes(config, layout, kernels, on_cpu), *fp8_faults(config, layout)]
    return [*faults, *violated, *(fault for fault in machine if fault.field not in refused)]


def _with_legal_layouts(fault: ConfigError, config: Config, layout: Layout) -> ConfigError:
    if fault.field != WORLD_SIZE:
        return fault
    nearest = ranked(config, nearest_layouts(config, layout))
    lines = [" ".join(near.overrides()) for near in nearest]
    if not lines:
        return fault
    options = "\n      ".join(lines)
    return ConfigError(
        fault.field, fault.problem, f"{fault.fix}, or a layout for {layout.world}:\n      {options}"
    )

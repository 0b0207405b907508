"""Is a config legal on a world of ranks? Every violated rule, with what would be legal."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.root import Config
from moe_train.config.validate import sizes_refused, validate
from moe_train.errors import ConfigError
from moe_train.plan.layout import Layout
from moe_train.plan.rules import WORLD_SIZE, layout_faults
from moe_train.plan.search import nearest_layouts
from moe_train.plan.sizes import layout_of


def check(config: Config, world: int) -> list[ConfigError]:
    """Every violated rule of `config` on `world` ranks; empty when it can run.

    Null parallel sizes count as `moe_train.plan.sizes.layout_of` fills them; resolve
    ``parallel.auto`` first (`moe_train.plan.search.resolve`).
    """
    faults = [*validate(config), *machine_faults(config)]
    if sizes_refused(faults):
        return faults
    layout = layout_of(config, world)
    return faults + [_with_legal_layouts(f, config, layout) for f in layout_faults(config, layout)]


def machine_faults(config: Config) -> Iterator[ConfigError]:
    """Features that the chosen device does not have."""
    if config.device != "cpu":
        return
    if config.dtype == "fp8":
        yield ConfigError("dtype", "fp8 needs TransformerEngine on a GPU", "dtype=bf16 or fp32")
    if config.parallel.dispatcher == "flex":
        yield ConfigError("parallel.dispatcher", "flex needs a GPU", "parallel.dispatcher=alltoall")
    if config.optim.offload:
        yield ConfigError("optim.offload", "there is no GPU to offload from", "optim.offload=false")


def _with_legal_layouts(fault: ConfigError, config: Config, layout: Layout) -> ConfigError:
    if fault.field != WORLD_SIZE:
        return fault
    lines = [" ".join(near.overrides()) for near in nearest_layouts(config, layout)]
    if not lines:
        return fault
    options = "\n      ".join(lines)
    return ConfigError(
        fault.field, fault.problem, f"{fault.fix}, or a layout for {layout.world}:\n      {options}"
    )

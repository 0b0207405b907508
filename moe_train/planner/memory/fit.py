"""Does a plan fit the device, and which overrides would make it fit?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_train.config.hardware import MachineFacts
from moe_train.config.kernels import TE, run_kernels
from moe_train.config.root import Config
from moe_train.config.schema import to_mapping, with_values
from moe_train.errors import ConfigError
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import bytes_per_parameter, variants
from moe_train.parallel.shapes import Assumptions
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.memory.stages import GB, StageMemory, plan_memory, stage_memory, worst

FIELD = "memory"
"""Field of the fault of a plan that does not fit."""


def assumptions_of(
    config: Config, imbalance: float = 1.0, fragmentation: float = 0.05
) -> Assumptions:
    """Assumptions for the kernels that `config` would run with on its hardware profile."""
    chosen = run_kernels(config.backend.kernels, config.hardware).kernels
    return Assumptions(imbalance, fragmentation, fused=chosen is TE)


def capacity(config: Config) -> float:
    """Bytes of one device."""
    return config.hardware.memory_gb * GB


def fits(config: Config, layout: Layout, vocab: int, assumptions: Assumptions) -> bool:
    """Whether the end stages, which need most, fit the profile's memory."""
    ends = {0, layout.pipeline - 1}
    return all(
        stage_memory(config, layout, vocab, stage, assumptions).total <= capacity(config)
        for stage in ends
    )


def remedies(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> Iterator[tuple[str, float]]:
    """Overrides with which the plan fits, and the bytes of the worst stage then."""
    for changed, words in _changes(config):
        need = worst(plan_memory(changed, layout, vocab, assumptions)).total
        if need <= capacity(config):
            yield words, need


def lighter(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> list[tuple[str, float]]:
    """Overrides with which the worst stage needs less than now, and its bytes then; least first."""
    now = worst(plan_memory(config, layout, vocab, assumptions)).total
    found = [
        (words, worst(plan_memory(changed, layout, vocab, assumptions)).total)
        for changed, words in _changes(config)
    ]
    return sorted((one for one in found if one[1] < now), key=lambda one: one[1])


def _changes(config: Config) -> Iterator[tuple[Config, str]]:
    options = variants(config)
    for name in ("distributed", "precision-aware", "offloaded"):
        yield options[name]
    if config.recompute.layers != "all":
        everything: dict[str, Any] = {"recompute.layers": "all", "recompute.modules": []}
        yield with_values(config, everything), "recompute=all"
        changed, words = options["precision-aware"]
        both = with_values(changed, everything)
        yield both, f"{words} recompute=all"
    if config.batch.micro > 1:
        smaller = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro=1))
        yield smaller, "batch.micro=1"


def memory_fault(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> ConfigError | None:
    """Why the plan does not fit the profile's device, or None if it does."""
    need = worst(plan_memory(config, layout, vocab, assumptions))
    if need.total <= capacity(config):
        return None
    fixes = [
        f"{words} ({bytes_ / GB:.1f} GB)"
        for words, bytes_ in remedies(config, layout, vocab, assumptions)
    ]
    more = "more ranks, or hardware with more memory"
    return ConfigError(
        FIELD,
        f"stage {need.stage} needs {need.total / GB:.1f} GB a device, of which "
        f"{need.state.device / GB:.1f} GB weights, gradients and optimizer; "
        f"{config.hardware.name} has {config.hardware.memory_gb:g} GB",
        "\n      or ".join(fixes) if fixes else more,
    )


def launch_fault(config: Config, layout: Layout, facts: MachineFacts) -> ConfigError | None:
    """Why the plan does not fit the devices that are there, or None if it does.

    A run is judged by what its devices have, whatever profile it is planned with, and without
    an allowance for fragmentation: that only a plan should be careful about. A CPU's ranks
    share their memory with everything else, so nothing is refused there.
    """
    if facts.kind == "cpu":
        return None
    found = dataclasses.replace(
        config.hardware,
        name=f"the smallest of the ranks' devices ({facts.device or facts.kind})",
        kind="accelerator",
        memory_gb=round(facts.memory_gb, 1),
    )
    here = dataclasses.replace(config, hardware=found)
    taken = assumptions_of(here, fragmentation=0.0)
    return memory_fault(here, layout, vocabulary(config)[0], taken)


def unpriced(config: Config) -> list[str]:
    """``megatron.*`` overrides that are set: they may change memory unknown to the formulas."""
    megatron = config.megatron
    sections = {
        "transformer": megatron.transformer, "ddp": megatron.ddp, "optimizer": megatron.optimizer
    }  # fmt: skip
    return [f"megatron.{name}.{key}" for name, keys in sections.items() for key in keys]


def memory_rows(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> list[dict[str, object]]:
    """The worst stage under each optimizer, and without one; bytes.

    ``each`` has the bytes per parameter, by what they are for, before any sharding.
    """
    rows: list[dict[str, object]] = []
    plain: StageMemory | None = None
    for name, (changed, words) in variants(config).items():
        need = worst(plan_memory(changed, layout, vocab, assumptions))
        if name == "precision-aware":
            plain = need
        each = dataclasses.asdict(bytes_per_parameter(changed.dtype, changed.optim))
        rows.append(
            {**_row(config, name, words, need.state.device, need.total, need), "each": each}
        )
    assert plain is not None
    bare = plain.state.weights + plain.state.gradients
    without = plain.total - plain.state.optimizer
    rows.insert(0, _row(config, "no optimizer state", "", bare, without, plain))
    return rows


def _row(
    config: Config, name: str, words: str, state: float, total: float, need: StageMemory
) -> dict[str, object]:
    return {
        "optimizer": name,
        "overrides": words,
        "state_bytes": state,
        "activation_bytes": need.activations,
        "tensor_bytes": state + need.activations,
        "total_bytes": total,
        "host_bytes": need.state.host if name != "no optimizer state" else 0,
        "fraction": total / capacity(config) if capacity(config) else None,
        "fits": total <= capacity(config),
    }


def profile(config: Config) -> dict[str, object]:
    """The hardware profile as plain data."""
    return to_mapping(config)["hardware"]  # type: ignore[no-any-return]

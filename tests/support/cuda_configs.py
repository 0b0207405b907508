"""Megatron's configs of a CUDA run, constructed on any machine.

``python -m tests.support.cuda_configs WORLD OVERRIDES...`` prints the three dataclasses, field
by field, as JSON. Nothing of the CPU backend is loaded. Where TransformerEngine is not
installed, the questions that Megatron asks it on the way are answered for the pinned version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from moe_train.planner.resolution import resolve_run

TRANSFORMER_ENGINE = "2.20.2"
"""Version that the answers below are those of; the one in constraints.txt."""


class FusedAdam:
    """Signature of TransformerEngine's optimizer, as far as Megatron looks at it."""

    def __init__(
        self,
        params: Any,
        master_weight_dtype: Any = None,
        exp_avg_dtype: Any = None,
        exp_avg_sq_dtype: Any = None,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        raise NotImplementedError("only its signature is looked at")


@contextlib.contextmanager
def transformer_engine_answers() -> Iterator[None]:
    """Let Megatron check its configs as on a machine with TransformerEngine."""
    if importlib.util.find_spec("transformer_engine") is not None:
        yield
        return
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    kernel = object()
    optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    modules = {
        name: types.ModuleType(name)
        for name in ("transformer_engine", "transformer_engine.pytorch")
    } | {optimizers.__name__: optimizers}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        stack.enter_context(mock.patch.object(utils, "_te_version", Version(TRANSFORMER_ENGINE)))
        for module, prefix in ((rope_utils, "fused_apply_rotary"), (moe_utils, "fused_")):
            for name in [name for name in vars(module) if name.startswith(prefix)]:
                stack.enter_context(mock.patch.object(module, name, kernel))
        yield


def cuda_configs(overrides: Sequence[str], world: int) -> dict[str, dict[str, str]]:
    """``transformer``, ``ddp`` and ``optimizer``: every field's ``repr`` by name.

    Raises:
        ConfigError: Megatron refuses one of them.
    """
    from moe_train.backend.cuda.backend import CudaBackend
    from moe_train.model.transformer_config import (
        ddp_config,
        optimizer_config,
        transformer_config,
    )

    config = resolve_run(overrides, world).config
    backend = CudaBackend(0, config.backend)
    with transformer_engine_answers():
        built = {
            "transformer": transformer_config(config, backend),
            "ddp": ddp_config(config),
            "optimizer": optimizer_config(config, backend),
        }
    return {name: fields(value) for name, value in built.items()}


def fields(value: Any) -> dict[str, str]:
    """Every field of a dataclass as text that is the same in every process."""
    text = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        name = getattr(content, "__qualname__", None)
        plain = f"{content.__module__}.{name}" if name else repr(content)
        text[field.name] = re.sub(r" at 0x[0-9a-f]+", "", plain)
    return text


if __name__ == "__main__":
    print(json.dumps(cuda_configs(sys.argv[2:], int(sys.argv[1]))))

"""Choice of the kernel set: ``backend.kernels``, and whether TransformerEngine imports."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache

from moe_train.config.kernels import TE, TORCH, TRANSFORMER_ENGINE, KernelChoice
from moe_train.config.training import BackendConfig
from moe_train.errors import ConfigError

OLDEST = "2.6"
"""First TransformerEngine with the fused router that Megatron 0.19 calls (its moe_utils)."""
WITHOUT = "backend.kernels=torch trains without it"


def choose_kernels(config: BackendConfig, *, on_cpu: bool) -> KernelChoice:
    """The kernel set of this process; imports TransformerEngine unless torch's is certain.

    Raises:
        ConfigError: ``backend.kernels=te`` where it cannot be.
    """
    if on_cpu:
        if config.kernels == "te":
            raise ConfigError(
                "backend.kernels",
                "te: TransformerEngine has no kernels for a CPU",
                "backend.kernels=auto or torch",
            )
        return KernelChoice(TORCH, "the only kernels of a CPU")
    if config.kernels == "torch":
        return KernelChoice(TORCH, "backend.kernels=torch")
    problem = transformer_engine_problem()
    if config.kernels == "te":
        if problem is not None:
            raise ConfigError(
                "backend.kernels",
                f"te: TransformerEngine cannot be used: {problem}",
                f"install the gpu extra (EXTRAS=dev,gpu make setup); {WITHOUT}",
            )
        return KernelChoice(TE, "backend.kernels=te")
    if problem is None:
        return KernelChoice(TE, "auto: TransformerEngine imports")
    return KernelChoice(TORCH, f"auto: TransformerEngine cannot be used: {problem}")


@cache
def transformer_engine_problem() -> str | None:
    """Why TransformerEngine cannot be used by this process; None if it can.

    The first answer holds: with torch's kernels it is hidden afterwards, and would be missing.
    """
    try:
        importlib.import_module(f"{TRANSFORMER_ENGINE}.pytorch")
    except (ImportError, OSError, RuntimeError) as problem:
        # Its libraries are loaded by path and its torch extension is checked against torch: a
        # wrong build shows as any of these.
        return str(problem).splitlines()[0] if str(problem) else type(problem).__name__
    version = str(getattr(sys.modules[TRANSFORMER_ENGINE], "__version__", OLDEST))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, OLDEST.split("."))):
        return f"it is {version}, and the kernels used here need {OLDEST}"
    return None

"""The constants that published runs fit; every other number is a profile's or a formula's.

``python -m benchmarks.published --fit`` fits them to the scored runs (docs/published.md), by least
squares on the logarithm of the seconds of a step, every model with the same weight. They hold for
all accelerators and models. A CPU's profile is measured as a whole by ``moe-train plan
--calibrate``, so its constants are the neutral ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config


@dataclass(frozen=True)
class Constants:
    """Shared by all accelerators and models."""

    host: float = 10.1
    """Host time of a kernel over the profile's launch_us: Python, autograd and
    TransformerEngine's checks around the launch itself."""
    elementwise: float = 1.93
    """Seconds of elementwise kernels over those of the bytes counted: small tensors, bytes that a
    formula leaves out, and gaps between kernels."""
    exchange: float = 1.06
    """Bandwidth of an exchange of rows over a large collective's (link_efficiency)."""
    hidden: float = 0.97
    """Share of communication that overlap hides where there is compute enough."""
    imbalance: float = 0.08
    """Rows of the busiest rank beyond the average, over it, under natural routing with an auxiliary
    loss of weight 0.01; they grow with the root of a smaller weight."""


BOUNDS = {
    "host": (2.0, 16.0),
    "elementwise": (1.0, 3.0),
    "exchange": (0.4, 1.1),
    "hidden": (0.3, 1.0),
    "imbalance": (0.0, 0.5),
}
"""Between which each makes sense."""

NEUTRAL = Constants(host=1.0, elementwise=1.0, exchange=1.0, hidden=1.0, imbalance=0.0)
"""Of a profile that was measured as a whole."""

CONSTANTS = Constants()
"""What predictions use."""


def constants(hardware: HardwareConfig) -> Constants:
    """The constants for a profile."""
    return NEUTRAL if hardware.kind == "cpu" else CONSTANTS


def natural_imbalance(config: Config) -> float:
    """Rows of the busiest rank over the average, where a router balances by itself.

    Without a balancing loss it is taken as with one of 0.001. The bias of balancing without a loss
    keeps at least the balance of a loss of 0.01 (arXiv:2408.15664, table 2).
    """
    router = config.model.router
    if router.force_balance:
        return 1.0
    weighted = any(one.weighted for one in router.balancing_methods)
    weight = router.aux_coeff if weighted and router.aux_coeff else 1e-3
    weight = max(weight, 1e-2) if router.expert_bias else weight
    return 1.0 + constants(config.hardware).imbalance * math.sqrt(1e-2 / weight)


@contextmanager
def using(other: Constants) -> Iterator[None]:
    """Predict with other constants, for a fit or a study of their influence."""
    global CONSTANTS
    before, CONSTANTS = CONSTANTS, other
    try:
        yield
    finally:
        CONSTANTS = before

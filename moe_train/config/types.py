"""Types of config values and the ranges that they may lie in.

Checked by pydantic in `moe_train.config.schema`. A value is converted only where nothing is lost:
YAML reads ``1e3`` as a float and Hydra reads ``run.name=7`` as an integer. A string is never
parsed, and what stands in quotes stays a string.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from moe_train.features.balancing import BALANCING
from moe_train.features.dispatchers import DISPATCHERS
from moe_train.features.optimizers import OPTIMIZERS
from moe_train.features.schedules import SCHEDULES

_LIMIT = 1 << 63


def _integer(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _bounded(value)


def _string(value: Any) -> Any:
    return str(_bounded(value)) if type(value) is int else value


def _bounded(value: Any) -> Any:
    # No config needs more, and Python refuses to print integers of thousands of digits.
    if isinstance(value, int) and abs(value) >= _LIMIT:
        raise ValueError("beyond 64 bits")
    return value


Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), BeforeValidator(_string)]
Integer = Annotated[int, Strict(), BeforeValidator(_integer)]
Number = Annotated[float, Strict(), BeforeValidator(_bounded), Field(allow_inf_nan=False)]

PositiveInteger = Annotated[Integer, Field(ge=1)]
NonNegativeInteger = Annotated[Integer, Field(ge=0)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(gt=0, le=1)]

# The upper bounds are beyond every model there is, and within what a plan computes in seconds.
Width = Annotated[PositiveInteger, Field(le=2**24)]
Count = Annotated[PositiveInteger, Field(le=2**16)]
Tokens = Annotated[PositiveInteger, Field(le=2**31 - 1)]
Batch = Annotated[PositiveInteger, Field(le=2**20)]

Dtype = Literal["fp32", "bf16", "fp8"]
Placement = Literal["stage", "span"]
GradientDtype = Literal["fp32", "bf16"]

# Names that the descriptors of features bring; a type checker cannot read them from a table.
if TYPE_CHECKING:
    BalancingName = str
    DispatcherName = str
    OptimizerName = str
    ScheduleName = str
else:
    BalancingName = Literal[*BALANCING]
    DispatcherName = Literal[*DISPATCHERS]
    OptimizerName = Literal[*OPTIMIZERS]
    ScheduleName = Literal["auto", *SCHEDULES]

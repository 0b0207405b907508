"""Values between torch's tensors and the integers that conversion moves."""

from __future__ import annotations

import torch

from moe_train.convert.tensors import Array

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""torch's dtypes by the names of safetensors, and back."""


def to_torch(dtype: str, values: Array) -> torch.Tensor:
    """A tensor of a safetensors dtype on the memory of the integers that hold it."""
    return torch.from_numpy(values).view(DTYPES[dtype])


def to_raw(tensor: torch.Tensor) -> Array:
    """The integers that hold a tensor's values, on its memory."""
    width = {4: torch.uint32, 2: torch.uint16}[tensor.itemsize]
    values: Array = tensor.detach().view(width).numpy()
    return values

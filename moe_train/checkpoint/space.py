"""Room for a checkpoint, looked for before the first byte is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

MARGIN = 1.02
"""Headers of the items and file-system blocks: measured at 0.5 % for items of 100 KB."""
FIXED = 1 << 20
"""Bytes for the index, the manifest and the folder itself."""


def bytes_to_write(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes (the others hold replicas of the rest)."""
    return sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in nested_values(sharded)
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)
    )


def check_free(folder: Path, size: int) -> None:
    """Refuse to begin a checkpoint of ``size`` bytes of tensors that has no room.

    Raises:
        OSError: too little is free; says what is needed and what is there.
    """
    needed, free = int(size * MARGIN) + FIXED, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.1f} MiB free and this checkpoint needs "
            f"{needed / 2**20:,.1f} MiB; a lower checkpoint.keep leaves more room"
        )

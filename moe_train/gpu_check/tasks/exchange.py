"""All-to-all by size, on every rank of a torchrun world; rank 0 writes the figures.

``python -m moe_train.gpu_check.tasks.exchange FILE gpu|cpu`` under torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.gpu_check.tasks.kernels import seconds

SIZES = [2**power for power in range(12, 31, 2)]
"""Bytes that each rank sends, 4 KiB to 1 GiB."""
TINY = SIZES[:2]


def measure(device: Any, sizes: list[int]) -> list[dict[str, Any]]:
    """Time of equal exchanges among all ranks, and the bandwidth of what leaves a rank."""
    world = dist.get_world_size()
    rows = []
    for size in sizes:
        # Without split sizes every rank sends the same to each.
        size -= size % world
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        dist.barrier()
        took = seconds(partial(dist.all_to_all_single, target, source))
        leaves = size * (world - 1) / world
        rows.append({"bytes": size, "us": took * 1e6, "gb_per_second": leaves / took / 1e9})
    return rows


def main(path: Path, on: str) -> None:
    """Open the world, measure, write."""
    local = int(os.environ["LOCAL_RANK"])
    if on == "gpu":
        torch.cuda.set_device(local)
        device = torch.device(torch.cuda.current_device())
        dist.init_process_group("nccl", device_id=torch.device(torch.cuda.current_device()))
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    rows = measure(device, SIZES if on == "gpu" else TINY)
    if dist.get_rank() == 0:
        path.write_text(json.dumps({"ranks": dist.get_world_size(), "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

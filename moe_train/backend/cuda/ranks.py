"""Number of ranks to start on this node: ``python -m moe_train.backend.cuda.ranks [--most N]``.

One for each GPU that this process sees; without any, eight on the CPU, as
`experiment=twin` has. Launchers run this before anything else, so it imports the standard library
alone.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_train.backend.cuda.devices import read_devices, visible

CPU_RANKS = 8
"""TP2 x PP4 of the twin."""


def ranks(
    environment: Mapping[str, str] | None = None,
    devices: Path = Path("/dev"),
    most: int | None = None,
) -> int:
    """Ranks of this node, `most` at most."""
    variables = os.environ if environment is None else environment
    table = read_devices(variables, devices)
    count = len(table.gpus) if table.complete else _nodes(variables, devices)
    count = count or CPU_RANKS
    return min(count, most) if most else count


def _nodes(variables: Mapping[str, str], devices: Path) -> int:
    """GPUs that the driver has made device nodes of, where nothing else describes them."""
    wanted = variables.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.startswith("MIG-"):
        return 1
    nodes = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if wanted is not None and wanted.startswith("GPU-"):
        return min(len(nodes), len(set(wanted.split(","))))
    return len(visible([path.name for path in nodes], wanted))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the number."""
    parser = argparse.ArgumentParser(prog="moe_train.backend.cuda.ranks", description=__doc__)
    parser.add_argument("--most", type=int, metavar="N", help="never more than this")
    print(ranks(most=parser.parse_args(argv).most))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

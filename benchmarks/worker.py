"""A contestant in a process of its own: a step for every line that comes in."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings

import torch

from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS


def main(name: str, case: str) -> None:
    """Print one JSON line when ready, and one for each step: its seconds and its loss."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    step = CONTESTANTS[name](CASES[case])
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        output = {"seconds": time.perf_counter() - begun, "loss": loss}
        print(json.dumps(output), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Regenerate the reference curves: ``python -m tests.support.reference_curves``.

Run it when numerics change on purpose; a test compares the shipped curves with a fresh run.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.files import write_atomically
from moe_train.gpu_check.bench import Bench
from moe_train.gpu_check.curves import FIELDS, reference_path
from moe_train.gpu_check.programs import training_lines
from moe_train.gpu_check.sizes import SMALL, STEPS

SECONDS = 300.0
VERSIONS = ("torch", "megatron-core", "numpy", "python", "processor", "cpu_capability")


def fresh(dtype: str, bench: Bench, steps: int) -> list[dict[str, Any]]:
    """The first ``steps`` training lines of a curve, made on this machine's CPU."""
    bench.begin(f"reference-{dtype}", SECONDS)
    overrides = [*overrides_of(dtype), f"train.steps={steps}"]
    return training_lines(bench.train_on_cpu("curve", overrides))


def overrides_of(dtype: str) -> list[str]:
    """Overrides of a reference curve."""
    return [*SMALL, f"dtype={dtype}"]


def make(dtype: str, bench: Bench) -> dict[str, Any]:
    """One curve on this machine's CPU, with its initial weights and versions."""
    overrides = overrides_of(dtype)
    steps = fresh(dtype, bench, STEPS)
    tokens = (bench.folder / "data" / "tokens.bin").read_bytes()
    machine = bench.host.call("facts", bench.left, gpu=False)["machine"]
    return {
        "made_with": {name: machine[name] for name in VERSIONS},
        "overrides": overrides,
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "steps": [{name: step[name] for name in FIELDS} for step in steps],
        "weights": bench.host.call("weights", bench.left, overrides=bench.cpu_overrides(overrides)),
    }


def main(argv: Sequence[str]) -> int:
    """Write both curves; returns the exit code."""
    if argv:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("cpu", 0, Path(folder))
        try:
            for dtype in ("fp32", "bf16"):
                path = reference_path(dtype)
                write_atomically(path, json.dumps(make(dtype, bench), indent=1) + "\n")
                print(f"wrote {path}")
        finally:
            bench.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

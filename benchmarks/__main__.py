"""``make bench``: times all contestants in turn and writes ``benchmarks/results/latest.json``.

Steps alternate between the contestants' processes, of which one runs at a time, so that a change
of the machine's speed meets all of them; a ratio is the median over the rounds of the other's
seconds divided by ours in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, TOKENS

RESULTS = Path(__file__).resolve().parent / "results" / "latest.json"
OURS = "ours"
OTHERS = ("megatron_sequential", "mixtral_grouped_fused", "mixtral_eager_fused")
WARM_UP = 2


class Contestant:
    """A worker process; ends with the stack that it is opened on."""

    def __init__(self, name: str, case: str, stack: ExitStack) -> None:
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", name, case],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
        assert self._process.stdin is not None
        stack.callback(self._process.stdin.close)
        self._answer()

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"benchmarks: {self._process.args!r} ended; see above")


def measure(case: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's step by contestant."""
    with ExitStack() as stack:
        field = {name: Contestant(name, case, stack) for name in (OURS, *OTHERS)}
        result: dict[str, list[float]] = {name: [] for name in field}
        for number in range(WARM_UP + rounds):
            for name, contestant in field.items():
                seconds = contestant.step()
                if number >= WARM_UP:
                    result[name].append(seconds)
    return result


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    args = parser.parse_args()
    ratios: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {}
    table = Table("case", "contestant", "seconds a step", "tokens/s", "ours is faster by")
    for case in CASES:
        result = measure(case, args.rounds)
        seconds[case] = {name: statistics.median(times) for name, times in result.items()}
        for name, middle in seconds[case].items():
            ratio = statistics.median(
                other / own for other, own in zip(result[name], result[OURS], strict=True)
            )
            if name != OURS:
                ratios[f"{case}_vs_{name}"] = ratio
            shown = "" if name == OURS else f"{ratio:.2f} x"
            table.add_row(case, name, f"{middle:.3f}", f"{TOKENS / middle:,.0f}", shown)
    Console().print(table)
    environment = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "rounds": args.rounds,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"ratios": ratios, "seconds": seconds, "environment": environment}, indent=2)
        + "\n"
    )
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()

"""``python -m moe_train.rehearsal [overrides ...]``: the CUDA program of a run, without a GPU."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_train.errors import EXIT_FINISHED, ConfigError
from moe_train.rehearsal.rank import Case, RankReport, to_json
from moe_train.rehearsal.rehearse import rehearse

EXAMPLES = """examples:
  python -m moe_train.rehearsal experiment=twin parallel=single train.steps=2
  python -m moe_train.rehearsal --world 2 experiment=twin parallel=single train.steps=2 \\
      parallel.pipeline=2 parallel.expert=2 parallel.placement=span

The program starts, trains, saves and ends as on GPUs, on CUDA tensors whose memory and kernels are
the host's: small sizes only. See docs/rehearsal.md for what stands in for what.

exit code: 0 every rank finished and nothing was found; 1 otherwise; 2 this machine cannot rehearse
"""


def main(argv: Sequence[str]) -> int:
    """Rehearse one run and print its findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_train.rehearsal",
        description="Run the CUDA program without a GPU and find mixed devices and host copies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--world", type=int, default=1, help="ranks, each with a GPU (default 1)")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="of each GPU (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="moe_train-rehearsed-") as runs:
        case = Case((f"run.dir={runs}", *args.overrides), args.world, args.memory_gb)
        try:
            [ranks] = rehearse([case], log=sys.stderr)
        except ConfigError as unable:
            print(f"moe_train: {unable}", file=sys.stderr)
            return unable.exit_code
    for rank, report in enumerate(ranks):
        _show(rank, report)
    if args.json:
        args.json.write_text(to_json([ranks]) + "\n")
    return EXIT_FINISHED if all(report.sound for report in ranks) else 1


def _show(rank: int, report: RankReport) -> None:
    print(f"rank {rank}: exit code {report.code}, {report.synchronizations} waits for the device")
    for copy in sorted(report.copies, key=lambda one: (one["place"], -one["count"])):
        print(f"  {copy['count']:6} {copy['kind']:12} {copy['place']:10} {copy['source']}")
    for finding in report.findings:
        print(f"  found {finding['count']} x {finding['kind']}: {finding['place']}, "
              f"{finding['source']}")  # fmt: skip
    if report.launches:
        print(f"  {report.launches} kernels were launched that a rehearsal does not have")
    if report.failure:
        print(report.failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

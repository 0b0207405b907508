"""The command line: which checks, on which device, and the exit code."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_train.backend.cuda.devices import accelerator_present
from moe_train.errors import ConfigError, MoeTrainError
from moe_train.gpu_check.bench import Bench, Check
from moe_train.gpu_check.checks import CHECKS
from moe_train.gpu_check.report import Report
from moe_train.gpu_check.suite import ONE_GPU_SECONDS, run
from moe_train.gpu_check.workers import ROOT

EXAMPLES = """examples:
  make gpu-check                                every check that this machine's GPUs allow
  make gpu-check CHECKS=curve-bf16,speed
  python -m moe_train.gpu_check --list
  python -m moe_train.gpu_check --device cpu    the suite's own machinery, at tiny sizes

exit code: 0 every check passed or was skipped, 1 a check failed, 2 bad arguments
"""
COUNTS = (1, 2, 4, 8)


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_train.gpu_check",
        description="Check training on this machine's GPUs; write gpu-report.md and .json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checks", default="", metavar="A,B", help="only these (default: all that GPUs allow)")
    add("--out", type=Path, default=Path("gpu-report"), metavar="DIR", help="of the report and "
        "the runs (default gpu-report)")  # fmt: skip
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu: the suite's machinery")
    add("--seconds", type=float, default=ONE_GPU_SECONDS, metavar="S",
        help=f"for all checks of one GPU together (default {ONE_GPU_SECONDS})")  # fmt: skip
    add("--patience", type=float, default=1.0, metavar="X",
        help="X times every check's time budget, where the machine is shared or slow")  # fmt: skip
    add("--keep", action="store_true", help="keep the runs' folders")
    add("--list", action="store_true", help="list the checks and end")
    args = parser.parse_args(argv)
    try:
        names = [name.strip() for name in args.checks.split(",") if name.strip()]
        chosen = select(names)
        on_cpu = args.device == "cpu"
        gpus = 0 if on_cpu else gpu_count()
        if args.list or not (gpus or on_cpu):
            print_list(chosen, gpus)
            return 0
        checks = [
            replace(check, seconds=round(check.seconds * args.patience))
            for check in runnable(chosen, named=bool(names), gpus=gpus, on_cpu=on_cpu)
        ]
        return _run(checks, args, gpus, argv)
    except MoeTrainError as fault:
        print(f"gpu_check: {fault}", file=sys.stderr)
        return fault.exit_code


def _run(checks: list[Check], args: argparse.Namespace, gpus: int, argv: Sequence[str]) -> int:
    device = "cpu" if args.device == "cpu" else "gpu"
    out: Path = args.out.resolve()
    work = out / f"work-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        work.mkdir(parents=True)
        facts = {
            "device": device,
            "gpus": gpus,
            "commit": commit(),
            "command": " ".join(["python -m moe_train.gpu_check", *argv]),
        }
        report = Report(out, checks, facts)
    except OSError as error:
        raise ConfigError(
            "--out", f"{out} cannot be written: {error.strerror}", "choose another folder"
        ) from error
    where = "the CPU" if device == "cpu" else f"{gpus} GPU(s)"
    print(f"{len(checks)} checks on {where}; report: {report.markdown}", flush=True)
    run(checks, Bench(device, gpus, work), report, lambda line: print(line, flush=True),
        args.seconds)  # fmt: skip
    if not args.keep:
        # Logs stay: they are small, and a failure's whole story.
        for folder in ("runs", "data", "cache"):
            _keep_logs(work / folder)
    return int(report.failed)


def _keep_logs(folder: Path) -> None:
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        elif path.suffix not in (".log", ".json"):
            path.unlink(missing_ok=True)


def select(names: Sequence[str]) -> list[Check]:
    """Checks by name, in the suite's order; all without names.

    Raises:
        ConfigError: a name that no check has, with the nearest.
    """
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, cutoff=0.4)
            raise ConfigError(
                "--checks",
                f"there is no check {name!r}",
                f"nearest: {', '.join(near)}" if near else f"one of: {', '.join(known)}",
            )
    return [check for check in CHECKS if not names or check.name in names]


def runnable(checks: Sequence[Check], *, named: bool, gpus: int, on_cpu: bool) -> list[Check]:
    """Those of ``checks`` that this machine can run, the environment's always first.

    Without names, a CPU runs the checks of one device.

    Raises:
        ConfigError: none of those that were named can run here.
    """
    if on_cpu:
        results = [check for check in checks if check.cpu and (named or check.gpus == 1)]
        need = "run on a GPU alone"
    else:
        results = [check for check in checks if check.gpus <= gpus]
        need = f"need more than the {gpus} GPU(s) of this machine"
    if named and len(results) < len(checks):
        others = [check.name for check in checks if check not in results]
        raise ConfigError("--checks", f"{', '.join(others)} {need}", "leave them out")
    return results if CHECKS[0] in results else [CHECKS[0], *results]


def print_list(checks: Sequence[Check], gpus: int) -> None:
    """Print the checks that would run, by number of GPUs."""
    if not gpus:
        print("This machine shows no GPU. With one, these would run:")
    for count in COUNTS:
        these = [check for check in checks if check.gpus == count]
        if not these:
            continue
        limit = f", {ONE_GPU_SECONDS} s in all" if count == 1 else ""
        print(f"\non {count} GPU{'s' * (count > 1)}{' or more' * (count < 8)}{limit}:")
        for check in these:
            cpu = "  (--device cpu too)" if check.cpu else ""
            print(f"  {check.name:<14} {check.seconds:>5} s  {check.asks}{cpu}")


def gpu_count() -> int:
    """GPUs that a driver shows on this machine, used or not; 0 where there is certainly none.

    Raises:
        ConfigError: a driver is there, but neither nvidia-smi nor torch can count its GPUs.
    """
    if not accelerator_present():
        return 0
    program = [sys.executable, "-c", "from moe_train.gpu_check.tasks.facts import devices\n"
               "import json\nprint(json.dumps(devices()))"]  # fmt: skip
    last = ""
    try:
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        seen = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError, subprocess.TimeoutExpired) as error:
        last = last or str(error)
        raise ConfigError(
            "gpu", f"a driver is there, but torch cannot query it: {last}",
            "put torch on PYTHONPATH; --device cpu checks the suite itself",
        ) from None  # fmt: skip
    # A driver without a usable GPU is a failure to tell: the environment check does.
    return max(1, int(seen["count"]))


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()

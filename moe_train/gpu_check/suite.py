"""Run checks one after the other, each with its budget, and keep the report up to date."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from moe_train.errors import MoeTrainError
from moe_train.gpu_check.bench import Bench, Check
from moe_train.gpu_check.findings import Failed, Findings, Skip, Verdict
from moe_train.gpu_check.report import Report

ONE_GPU_SECONDS = 480
"""All checks of one GPU together; what is left then is skipped."""


class Interrupted(BaseException):
    """A stop signal; like KeyboardInterrupt, only the suite handles it."""


def run(
    checks: Sequence[Check],
    bench: Bench,
    report: Report,
    say: Callable[[str], None],
    one_gpu_seconds: float = ONE_GPU_SECONDS,
) -> None:
    """Run ``checks`` and write every verdict at once.

    Args:
        say: called with one line a check.
        one_gpu_seconds: for all checks of one GPU together.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    begun = time.monotonic()
    broken = ""
    state = "interrupted"
    try:
        for check in checks:
            seconds = float(check.seconds)
            if check.gpus == 1:
                seconds = min(seconds, one_gpu_seconds - (time.monotonic() - begun))
            if broken:
                report.end(check.name, "skip", broken, 0.0)
            elif seconds < 1:
                report.end(check.name, "skip", f"no time is left of the {one_gpu_seconds:g} s of "
                           f"one GPU's checks: CHECKS={check.name} runs it alone", 0.0)  # fmt: skip
            else:
                verdict, reason = one(check, bench, report, seconds)
                if check.name == "environment":
                    report.machine = bench.machine
                    if verdict == "fail":
                        broken = "the environment check has failed"
            entry = report.entries[check.name]
            first = f": {entry.reason.splitlines()[0]}" if entry.reason else ""
            say(f"{entry.verdict:<5} {check.name}, {entry.seconds:.1f} s{first}")
        state = "finished"
    except (KeyboardInterrupt, Interrupted):
        say("stopped: the report has what was found")
    finally:
        bench.close()
        report.finish(state)
        signal.signal(signal.SIGTERM, before)


def one(check: Check, bench: Bench, report: Report, seconds: float) -> tuple[Verdict, str]:
    """Run one check with ``seconds`` to spend; returns verdict and reason, written already."""
    if check.gpus > 1:
        # Its ranks need all of every card.
        bench.close()
    findings = Findings()
    report.begin(check.name, findings)
    bench.begin(check.name, seconds)
    begun = time.monotonic()
    verdict: Verdict = "pass"
    reasons: list[str] = []
    try:
        check.run(bench, findings)
    except Skip as skipped:
        verdict, reasons = "skip", [str(skipped)]
    except Failed as failed:
        reasons = [str(failed)]
    except MoeTrainError as fault:
        reasons = [f"{type(fault).__name__}: {fault}"]
    # A check may trip over anything that another machine's answer makes of it.
    except Exception as error:  # noqa: BLE001
        reasons = [f"{type(error).__name__}: {error}\n{traceback.format_exc()}"]
    if verdict != "skip" or findings.failures:
        reasons = [*findings.failures, *reasons]
        verdict = "fail" if reasons else "pass"
    if verdict == "fail":
        # Whatever state the workers are in, the next check starts with fresh ones.
        bench.close()
    reason = "\n".join(reasons)
    report.end(check.name, verdict, reason, time.monotonic() - begun)
    return verdict, reason


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted

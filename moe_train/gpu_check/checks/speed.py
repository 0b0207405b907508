"""Speed: step time, GPU utilisation and synchronisations with the host."""

from __future__ import annotations

import statistics
from typing import Any

from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.findings import Findings

STEPS = 8
"""Timed steps; the first two are left out of the median."""


def opened(bench: Bench) -> tuple[list[str], dict[str, Any]]:
    """The session of the timings, open: its overrides and facts."""
    folder = bench.folder / "runs"
    overrides = [*bench.overrides_of(bench.sizes.large), f"run.dir={folder}", "run.name=session",
             "checkpoint.keep=1"]  # fmt: skip
    return overrides, bench.do("open", overrides=overrides)


@check("speed", 1, 120, cpu=True)
def speed(bench: Bench, findings: Findings) -> None:
    """How long is a step, how many tokens/s, which MFU?"""
    overrides, session = opened(bench)
    findings.note(parameters=session["parameters"], open_seconds=session["seconds"])
    result = bench.do("steps", count=STEPS)
    seconds = statistics.median(result["seconds"][2:])
    rate = session["tokens_per_step"] / seconds
    findings.note(
        first_step_seconds=result["seconds"][0],
        step_seconds=result["seconds"],
        tokens_per_second=rate,
        model_tflops=rate * session["flops_per_token"] / 1e12,
        hardware_profile=session["hardware"],
    )
    plan = bench.do("plan", overrides=overrides, world=1)
    time = plan.get("time", {})
    findings.compare("step", "s", time.get("step_seconds"), seconds)
    findings.compare("tokens", "1/s", time.get("tokens_per_second"), rate)
    peak = session["peak_flops"]
    if peak:
        findings.compare("MFU", "", time.get("mfu"), rate * session["flops_per_token"] / peak)
    findings.require(seconds > 0, "a step took no time")


@check("profile", 1, 90, cpu=True)
def profile(bench: Bench, findings: Findings) -> None:
    """Which kernels take the time, and where does the host wait?"""
    opened(bench)
    result = bench.do("profile")
    findings.note(**result)
    findings.require("profiled_error" not in result, f"no profile: {result.get('profiled_error')}")
    if bench.device == "gpu" and "profiled_error" not in result:
        findings.require("kernels" in result, "the profile has no device events")

"""Fault tolerance: a killed run resumes bitwise."""

from __future__ import annotations

import signal

from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.curves import judge
from moe_train.gpu_check.findings import Findings
from moe_train.gpu_check.programs import training_lines
from moe_train.gpu_check.sizes import CURVE, SMALL

KILLED_AT = 13


@check("resume", 1, 120, cpu=True)
def resume(bench: Bench, findings: Findings) -> None:
    """Does a run that SIGKILL ended continue on the uninterrupted curve?"""
    overrides = [*SMALL, "dtype=bf16", f"train.steps={CURVE}"]
    saving = [*overrides, "checkpoint.every=5"]
    killed = bench.launch("killed", saving, plant=["kill", str(KILLED_AT), "0"])
    findings.require(
        killed.code == -signal.SIGKILL, f"the run was to die of SIGKILL, and ended {killed.code}"
    )
    findings.require(
        [step["step"] for step in killed.steps] == list(range(1, KILLED_AT)),
        f"the killed run has {len(killed.steps)} steps, not {KILLED_AT - 1}",
    )
    bench.launch("killed", saving).finished()
    whole = training_lines(bench.train("whole", overrides))
    steps = training_lines(bench.run_folder("killed"))
    findings.require(
        [step["step"] for step in steps] == list(range(1, CURVE + 1)),
        "steps are missing or twice in the resumed run",
    )
    judge(findings, "against the uninterrupted run", steps, whole, "bf16")

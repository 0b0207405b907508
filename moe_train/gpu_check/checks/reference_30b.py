"""Eight GPUs: the 30B reference config against its plan."""

from __future__ import annotations

import shutil
import statistics

from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.findings import Findings
from moe_train.gpu_check.programs import Ended

REFERENCE = [
    "experiment=moe_30b_8x64gb",
    "model.vocab=50304",
    "train.eval_every=0",
    "train.steps=5",
]
CHECKPOINT_BYTES = 14 * 30.1e9
"""bf16 weights and 12 bytes of fp32 master weights and moments a parameter."""


@check("30b-span", 8, 1500)
def spanning_layout(bench: Bench, findings: Findings) -> None:
    """Do five steps and a save of the 30B run as planned, spanning?"""
    saves = shutil.disk_usage(bench.folder).free > 1.2 * CHECKPOINT_BYTES
    findings.note(saves=saves)
    overrides = [*REFERENCE, *(["checkpoint.every=5", "checkpoint.keep=1"] if saves else [])]
    _compare(bench.launch("span", overrides, 8), findings)
    saved = bench.run_folder("span") / "checkpoints"
    if saves and saved.exists():
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        findings.note(checkpoint_bytes=size)
        findings.require(size > 0.5 * CHECKPOINT_BYTES, "the 30B was not saved")
        shutil.rmtree(saved)


@check("30b-fastest", 8, 1200)
def fastest(bench: Bench, findings: Findings) -> None:
    """Does the planner's fastest layout of the 30B run as planned?"""
    best = bench.do("fastest", overrides=bench.overrides_of(REFERENCE), world=8)
    findings.note(fastest=best["tag"])
    _compare(bench.launch("fastest", [*REFERENCE, *best["overrides"]], 8), findings)


def _compare(ended: Ended, findings: Findings) -> None:
    """Steps and memory of a finished run beside its own plan.json."""
    steps = ended.finished().steps
    findings.note(loss=[step["loss"] for step in steps],
                  step_seconds=[step["step_seconds"] for step in steps])  # fmt: skip
    time = ended.plan.get("time", {})
    seconds = statistics.median(step["step_seconds"] for step in steps[1:])
    findings.compare("step", "s", time.get("step_seconds"), seconds)
    mfu = steps[-1].get("mfu")
    if mfu is not None:
        findings.compare("MFU", "", time.get("mfu"), mfu)
    stages = ended.plan.get("memory", {}).get("stages", [])
    planned = max((stage.get("total_bytes", 0) for stage in stages), default=None)
    findings.compare("peak", "bytes", planned, max(step["peak_memory_bytes"] for step in steps))
    findings.require(len(steps) == 5, f"{len(steps)} steps, not 5")

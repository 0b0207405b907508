"""Memory: planned against measured, extra memory of saves and updates, out-of-memory errors."""

from __future__ import annotations

import shutil

from moe_train.errors import EXIT_MEMORY
from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.checks.speed import opened
from moe_train.gpu_check.findings import Findings, Skip
from moe_train.gpu_check.sizes import DEEP, HELD_BACK_GB, SMALL, WIDE

POLICIES = ("none", "2-15", "all")
OVER, UNDER = 0.10, 0.20
"""Tolerated relative differences of the allocator's peak from the dry run's. Kernels use workspace
that the dry run does not see; what lies below it is waste of a plan, and no danger to a run."""
ADDED = 1_000_000_000
"""Bytes that an update, a save or a load may add on the device; one parameter if it is larger."""


@check("memory", 1, 150)
def memory(bench: Bench, findings: Findings) -> None:
    """Is the allocator's peak what dry run and plan say?"""
    bench.host.begin(
        "dry_run", overrides=["device=cpu", *DEEP, "data.tokenizer=byte"], policies=list(POLICIES)
    )
    measured = {}
    for policy in POLICIES:
        overrides = bench.overrides_of([*DEEP, f"recompute.layers={policy}", "run.name=memory",
                             f"run.dir={bench.folder / 'runs'}"])  # fmt: skip
        base = bench.do("open", overrides=overrides)["base_bytes"]
        result = bench.do("steps", count=3)
        measured[policy] = result["allocated_bytes"] - base
        findings.note(
            **{
                f"{policy}: held before": base,
                f"{policy}: reserved over allocated": result["reserved_bytes"]
                / max(1, result["allocated_bytes"]),
            }
        )
        plan = bench.do("plan", overrides=overrides, world=1)
        stage = plan.get("memory", {}).get("stages", [{}])[0]
        planned = stage.get("allocated_bytes")
        findings.compare(f"peak, recompute {policy}, plan", "bytes", planned, measured[policy])
    bench.do("close")
    for dry in bench.host.finish(bench.left):
        policy = dry["recompute"]
        peak = dry["peak"]["bytes"]
        findings.compare(f"peak, recompute {policy}, dry run", "bytes", peak, measured[policy])
        off = measured[policy] / peak - 1
        findings.require(
            -UNDER <= off <= OVER,
            f"recompute {policy}: the peak is {off:+.1%} from the dry run's",
        )


@check("storage", 1, 120, cpu=True)
def storage(bench: Bench, findings: Findings) -> None:
    """How fast are save and load, and do they and the update stay below 1 GB?"""
    _, session = opened(bench)
    need = 16 * session["parameters"]
    free = shutil.disk_usage(bench.folder).free
    if free < 2 * need:
        raise Skip(f"the disk has {free / 1e9:.0f} GB free, the state needs {need / 1e9:.0f} GB")
    updated = bench.do("update")
    findings.note(**{f"update_{key}": value for key, value in updated.items()})
    result = bench.do("save_and_load")
    findings.note(
        **result,
        save_gb_per_second=result["bytes"] / result["save_seconds"] / 1e9,
        load_gb_per_second=result["bytes"] / result["load_seconds"] / 1e9,
    )
    findings.require(result["bytes"] > 2 * session["parameters"], "the checkpoint is too small")
    allowed = max(ADDED, session["largest_parameter_bytes"])
    for what, added in (
        ("update", updated.get("added_bytes")),
        ("save", result.get("save_added_bytes")),
        ("load", result.get("load_added_bytes")),
    ):
        if added is not None:
            findings.require(
                added <= allowed, f"the {what} added {added / 1e9:.2f} GB on the device"
            )


@check("oom", 1, 90, cpu=True)
def oom(bench: Bench, findings: Findings) -> None:
    """Is out of memory reported as such?"""
    if bench.device == "gpu":
        # The plan fits the card, so it is not refused; another process has the memory.
        held = bench.do("fill_memory", leave_gb=HELD_BACK_GB)
        findings.note(held_gb=held)
        ended = bench.launch("wide", [*WIDE, "train.steps=3"])
        bench.do("close")
    else:
        ended = bench.launch("small", [*SMALL, "train.steps=3"], plant=["memory", "2", "0"])
    status = ended.status
    findings.note(exit_code=ended.code, status=status)
    findings.require(
        ended.code == EXIT_MEMORY, f"exit code {ended.code}, not {EXIT_MEMORY}\n{ended.output}"
    )
    findings.require(status.get("state") == "failed", f"status.json says {status}")
    findings.require("memory" in str(status.get("reason")), "status.json does not say memory")
    findings.require("peer" not in ended.output, "out of memory is reported as a lost peer")

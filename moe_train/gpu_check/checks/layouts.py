"""Several GPUs: loss curves of parallel layouts, all-to-all bandwidth, a lost rank."""

from __future__ import annotations

import re
from functools import partial

from moe_train.gpu_check.bench import Bench, Check, check
from moe_train.gpu_check.curves import judge, reference
from moe_train.gpu_check.findings import Findings
from moe_train.gpu_check.sizes import CURVE, SMALL

SPAN = "parallel.placement=span"
OVERLAP = "parallel.overlap_expert_comm=true"
VICTIM = 1


def _layout(ranks: int, sizes: tuple[str, ...], bench: Bench, findings: Findings) -> None:
    overrides = [*SMALL, "dtype=fp32", f"train.steps={CURVE}", *sizes]
    ended = bench.launch("run", overrides, ranks).finished()
    steps = ended.steps
    findings.note(step_seconds=[step["step_seconds"] for step in steps])
    judge(findings, "against the shipped CPU curve", steps, reference("fp32")["steps"], "fp32")


@check("lost-rank", 2, 150, cpu=True)
def lost_rank(bench: Bench, findings: Findings) -> None:
    """Is a rank that was killed named?"""
    overrides = [*SMALL, "dtype=fp32", "train.steps=200", "parallel.expert=2",
             "backend.timeout_seconds=40"]  # fmt: skip
    ended = bench.launch("killed", overrides, 2, plant=["kill", "5", str(VICTIM)], spare=5)
    reason = str(ended.status.get("reason", ""))
    findings.note(exit_code=ended.code, status=ended.status)
    findings.require(ended.code != 0, "the run ended with exit code 0")
    findings.require(ended.status.get("state") == "failed", f"status.json says {ended.status}")
    # A survivor names it, or torchrun's closing report ("rank      : 1 (local_rank: 1)") does.
    named = re.search(rf"\brank\s*:?\s*{VICTIM}\b", f"{reason}\n{ended.output}")
    findings.require(named is not None, f"nobody names rank {VICTIM}\n{ended.output}")


@check("alltoall", 2, 90, cpu=True)
def alltoall(bench: Bench, findings: Findings) -> None:
    """How fast is an all-to-all, by size?"""
    result = bench.exchange(bench.gpus if bench.device == "gpu" else 2)
    findings.note(ranks=result.get("ranks"), exchanges=result.get("rows"))
    findings.require(bool(result.get("rows")), "no size was measured")


def _checks(gpus: int, table: dict[str, tuple[str, tuple[str, ...]]]) -> list[Check]:
    return [
        Check(name, f"Is {what} on the reference curve?", gpus, 120,
              partial(_layout, gpus, sizes), cpu=True)
        for name, (what, sizes) in table.items()
    ]  # fmt: skip


TWO = [
    *_checks(
        2,
        {
            "tp2": ("TP2", ("parallel.tensor=2",)),
            "ep2": ("EP2", ("parallel.expert=2",)),
            "pp2": ("PP2", ("parallel.pipeline=2",)),
            "dp2": ("DP2 with the distributed optimizer", ("optim.distributed=true",)),
            "span2": (
                "PP2.EP2 span", ("parallel.pipeline=2", "parallel.expert=2", SPAN),
            ),
            "span2-overlap": (
                "PP2.EP2 span with overlap",
                ("parallel.pipeline=2", "parallel.expert=2", SPAN, OVERLAP),
            ),
        },
    ),
    lost_rank,
    alltoall,
]  # fmt: skip
FOUR = _checks(
    4,
    {
        "tp2-pp2": ("TP2.PP2", ("parallel.tensor=2", "parallel.pipeline=2")),
        "span4": (
            "TP2.PP2.EP4 span",
            ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4", SPAN),
        ),
        "span4-overlap": (
            "TP2.PP2.EP4 span with overlap",
            ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4", SPAN, OVERLAP),
        ),
    },
)  # fmt: skip

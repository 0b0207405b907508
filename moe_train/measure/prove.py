"""Real peaks of candidates of a search, on fake tensors, beside the predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_train.measure.dryrun.prepare import cpu_backend, enough_microbatches, first_of_stages
from moe_train.measure.dryrun.report import difference, planned
from moe_train.planner.plan import Plan
from moe_train.planner.search import Candidate

if TYPE_CHECKING:
    from moe_train.measure.dryrun.rank import RankRun


@dataclass(frozen=True)
class Proof:
    """One candidate's dry run: the rank that needs most, in bytes without allowances."""

    layout: str
    stage: int
    peak: float
    predicted: float
    difference: float
    """Predicted over real, less one."""
    changed: str
    """Options that the dry run leaves out; empty where it runs the candidate as it is."""
    skipped: str = ""
    """Why it was not run; empty where it was."""

    def report(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "layout": self.layout,
            "stage": self.stage,
            "peak_bytes": self.peak,
            "predicted_bytes": self.predicted,
            "difference": self.difference,
            "changed": self.changed,
            "skipped": self.skipped,
        }


def prove(candidates: Sequence[Candidate], imbalance: float) -> list[Proof]:
    """Dry runs of `candidates`: one rank of each stage, with torch's kernels.

    Args:
        imbalance: rows of a rank's experts over the average, of run and prediction.
    """
    # Megatron's modules come only after the host is prepared for them.
    backend = cpu_backend(candidates[0].config)

    from moe_train.measure.dryrun.rank import dry_run

    proofs: list[Proof] = []
    for candidate in candidates:
        plan, changed = runnable(candidate.plan)
        tag = plan.layout.tag
        if plan.layout.context > 1:
            why = "context parallelism needs TransformerEngine's attention"
            proofs.append(Proof(tag, 0, 0.0, 0.0, 0.0, changed, why))
            continue
        count = min(plan.microbatches, enough_microbatches(plan.layout))
        runs: list[RankRun] = [
            dry_run(plan, backend, rank, imbalance=imbalance, microbatches=count)
            for rank in first_of_stages(plan.layout)
        ]
        most = max(runs, key=lambda one: one.peak.bytes)
        expected = planned(plan, most.stage, imbalance)
        proofs.append(
            Proof(
                tag, most.stage, float(most.peak.bytes), expected.allocated,
                difference(most, expected), changed,
            )
        )  # fmt: skip
    return proofs


def runnable(plan: Plan) -> tuple[Plan, str]:
    """`plan` as far as fake tensors on a host can run it, and what was changed.

    The dry run follows one pass at a time, and DeepEP's kernels need a GPU.
    """
    parallel, changed = plan.config.parallel, []
    if parallel.overlap_expert_comm:
        parallel = replace(parallel, overlap_expert_comm=False)
        changed.append("without overlap")
    if parallel.dispatcher == "flex":
        parallel = replace(parallel, dispatcher="alltoall")
        changed.append("all-to-all for flex")
    return plan.under(replace(plan.config, parallel=parallel)), ", ".join(changed)

"""Environment: GPUs, driver, versions and importable packages."""

from __future__ import annotations

from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.findings import Findings


@check("environment", 1, 120, cpu=True)
def environment(bench: Bench, findings: Findings) -> None:
    """Do the packages import, and can torch use the GPUs?"""
    gpu = bench.device == "gpu"
    result = bench.do("facts", gpu=gpu)
    bench.machine = result["machine"]
    findings.note(**result["machine"])
    for name, why in result["missing"].items():
        findings.fail(f"{name} does not import ({why}): put it on PYTHONPATH (docs/gpu-check.md)")
    if gpu:
        seen = bench.do("devices")
        findings.note(usable_gpus=seen["count"])
        findings.require(
            seen["count"] > 0,
            f"torch cannot use a GPU here: {seen['error']} (torch is built for "
            f"{seen['built_for'] or 'no GPU at all'})",
        )
    # Asking has started CUDA, which reads its environment then: runs set theirs first.
    bench.here.stop()

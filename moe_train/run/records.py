"""The description of a run in its folder: config.yaml, plan.json, status.json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moe_train.config.schema import to_mapping
from moe_train.files import write_atomically
from moe_train.planner.cost.compute import peak_flops
from moe_train.planner.report.plan_report import plan_report
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import write_status

if TYPE_CHECKING:
    from moe_train.config.kernels import KernelChoice
    from moe_train.config.root import Config
    from moe_train.parallel.resolved import ResolvedRun


def describe_run(
    folder: RunFolder, run: ResolvedRun, step: int, kernels: KernelChoice | None = None
) -> None:
    """Write config, plan and the running status into the run folder.

    Args:
        kernels: the kernel set, once it is chosen.
    """
    folder.write_config(to_mapping(run.config))
    report = plan_report(run.config, run.layout, kernels=kernels)
    write_atomically(folder.plan, json.dumps(report, indent=1) + "\n")
    write_status(folder.status, "running", step)


def device_peak(config: Config) -> float:
    """Peak FLOP/s of one device, for MFU; 0 where the hardware profile is not the device's."""
    hardware = config.hardware
    own = hardware.peak_known and (hardware.kind == "cpu") == (config.device == "cpu")
    return peak_flops(config) if own else 0.0

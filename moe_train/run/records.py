"""What rank 0 writes and shows: the run folder's own files, metrics, console, summary."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_train.config.schema import to_mapping
from moe_train.planner.cost.compute import peak_flops
from moe_train.planner.report.plan_report import plan_report
from moe_train.run_folder.files import write_atomically
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import write_status

if TYPE_CHECKING:
    from moe_train.callbacks.recorder import Recorder
    from moe_train.config.kernels import KernelChoice
    from moe_train.config.root import Config
    from moe_train.parallel.layout import Layout
    from moe_train.run.opening import Session


def describe_run(
    folder: RunFolder,
    config: Config,
    layout: Layout,
    step: int,
    kernels: KernelChoice | None = None,
) -> None:
    """Write config, plan and the running status into the run folder.

    Args:
        kernels: the kernel set, once it has been taken.
    """
    folder.write_config(to_mapping(config))
    report = plan_report(config, layout, kernels=kernels)
    write_atomically(folder.plan, json.dumps(report, indent=1) + "\n")
    write_status(folder.status, "running", step)


def device_peak(config: Config) -> float:
    """FLOP/s that MFU compares one device with; 0 where the profile is not the device's."""
    hardware = config.hardware
    own = hardware.peak_known and (hardware.kind == "cpu") == (config.device == "cpu")
    return peak_flops(config) if own else 0.0


def open_recorder(session: Session, datasets: Any, start: int, stack: ExitStack) -> Recorder:
    """Metrics, console and mirror of rank 0; ``stack`` closes them."""
    from moe_train.callbacks.progress import ConsoleProgress
    from moe_train.callbacks.recorder import Recorder
    from moe_train.callbacks.wandb import Mirror
    from moe_train.data.entropy import dataset_entropy
    from moe_train.parallel.flops import flops_per_token
    from moe_train.run_folder.metrics import MetricsLog

    config, folder = session.config, session.folder
    assert folder is not None
    log = stack.enter_context(MetricsLog(folder.metrics))
    tokens = stack.enter_context(MetricsLog(folder.tokens))
    progress = ConsoleProgress(config.log.console, config.train.log_every)
    stack.callback(progress.finish)
    mirror = Mirror(
        config.log.wandb,
        project=config.log.wandb_project,
        name=folder.path.name,
        folder=folder.wandb,
        config=to_mapping(config),
        warn=progress.message,
        log=folder.logs / "wandb.log",
    )
    stack.callback(mirror.finish, timeout=10.0)
    entropy = None
    if datasets.valid is not None:
        entropy = dataset_entropy(datasets.valid, config.train.eval_batches * session.batch)
    progress.start(config.train.steps, start)
    flops = flops_per_token(config.model, config.data.sequence, session.vocab)
    peak = device_peak(config)
    recorder = Recorder(
        folder,
        log,
        tokens,
        progress,
        mirror,
        flops_per_token=flops.total,
        peak_flops=peak * session.engine.backend.devices(session.world),
        unigram_entropy=entropy,
    )
    recorder.truncate_after(start)
    return recorder


def finish(recorder: Recorder, folder: RunFolder, seconds: float) -> None:
    """Write the finished status and show the summary (rank 0).

    Args:
        seconds: wall time of this process.
    """
    from moe_train.callbacks.summary import summarise
    from moe_train.run_folder.metrics import read

    records = read(folder.metrics)
    entropy = next((r["unigram_entropy"] for r in records if "unigram_entropy" in r), None)
    summary = summarise(
        records,
        state="finished",
        wall_seconds=seconds,
        run_folder=folder.path,
        unigram_entropy=entropy,
    )
    write_status(folder.status, "finished", summary.step)
    recorder.mirror.summary({k: v for k, v in asdict(summary).items() if k != "run_folder"})
    recorder.progress.finish(summary)

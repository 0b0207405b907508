"""Traces: one step of all ranks for Perfetto (``train.trace``), torch.profiler's own profiles
(``train.profile_steps``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.files import write_atomically
from moe_train.run_folder.trace_events import process, trace_text
from moe_train.train.callback import Callback, EndEvent, StartEvent, StepEvent
from moe_train.train.tracing import Tracer

LOGGER = logging.getLogger(__name__)
WARMUP = 2
"""The step after a start that is traced: in the first one, much happens for the first time.
Steps before a profile: that one, and one that warms the profiler up."""


class StepTrace(Callback):
    """Chooses the step that the tracer records, and writes the file; on every rank.

    Required, since gathering the events takes all ranks.

    Args:
        tracer: the engine's.
        path: trace.json.
        layout: its tag, written beside the events.
    """

    required = True

    def __init__(self, tracer: Tracer, path: Path, layout: str) -> None:
        self._tracer, self._path, self._layout = tracer, path, layout

    def on_start(self, event: StartEvent) -> None:
        """Choose the second step; the last one where there is no second."""
        self._tracer.target = min(event.step + WARMUP, event.steps)

    def on_step(self, event: StepEvent) -> None:
        """Gather and write the recorded step."""
        if self._tracer.step != event.step:
            return
        rank, stage = dist.get_rank(), self._tracer.stage
        # A process each, sorted by stage and rank.
        events = process(rank, f"rank {rank}, stage {stage} (measured)", stage * 1000 + rank)
        events += [{**one, "pid": rank} for one in self._tracer.events]
        ranks: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object((stage, rank, events), ranks)
        if ranks is not None:
            merged = [one for _, _, events in sorted(ranks) for one in events]
            metadata = {
                "layout": self._layout,
                "step": event.step,
                "run": self._path.parent.name,
                "source": "measured",
            }
            write_atomically(self._path, trace_text(merged, metadata))
        self._tracer.step, self._tracer.events = None, []


class TorchProfiler(Callback):
    """Profiles steps with torch.profiler, a file a rank: operators, kernels and their overlap.

    Args:
        steps: how many; they follow a first step, in which much happens for the first time, and
            one that warms the profiler up.
        folder: gets ``profile_rank_K.json`` (Chrome's format, for Perfetto).
        device: whose kernels are recorded beside the CPU's operators.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device) -> None:
        self._steps, self._folder, self._device = steps, folder, device
        self._rank = self._done = 0
        self._profiler: torch.profiler.profile | None = None

    def on_start(self, event: StartEvent) -> None:
        """Begin with the next step."""
        self._rank = event.rank
        profiler = torch.profiler.profile(
            activities=activities(self._device),
            schedule=torch.profiler.schedule(
                wait=1, warmup=WARMUP - 1, active=self._steps, repeat=1
            ),
            on_trace_ready=self._write,
        )
        profiler.start()
        self._profiler = profiler

    def on_step(self, event: StepEvent) -> None:
        """A step is done."""
        assert self._profiler is not None
        self._done += 1
        self._profiler.step()

    def on_end(self, event: EndEvent) -> None:
        """Stop; a profile of fewer steps is written too, and one of none is reported."""
        if self._profiler is None:
            return
        self._profiler.stop()
        if self._done <= WARMUP and self._rank == 0:
            LOGGER.warning(
                "train.profile_steps=%d: no profile was written, since the run ended after %d "
                "steps and the profile begins with step %d after the start; raise train.steps",
                self._steps,
                self._done,
                WARMUP + 1,
            )

    def _write(self, profiler: Any) -> None:
        if self._done > WARMUP:
            path = self._folder / f"profile_rank_{self._rank}.json"
            profiler.export_chrome_trace(str(path))


def activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """What torch.profiler records: the CPU's operators, and the kernels of another device."""
    known = torch.profiler.ProfilerActivity.__members__
    return [known[name] for name in dict.fromkeys(("CPU", device.type.upper()))]

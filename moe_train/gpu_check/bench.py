"""A check, and its resources: worker processes, runs, model sizes and its time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.gpu_check.findings import Failed, Findings
from moe_train.gpu_check.programs import Ended, launch, read_json, start
from moe_train.gpu_check.sizes import CPU, GPU, QUIET
from moe_train.gpu_check.workers import Worker


class Bench:
    """Workers, data and time budget of one suite.

    Args:
        device: ``gpu`` or ``cpu``: where the checked side of every check runs.
        gpus: GPUs of this machine.
        folder: for runs, logs and data.

    Attributes:
        here: worker on the checked device.
        te: worker on the checked device for TransformerEngine's kernels: Megatron is imported once
            in a process, and differently for each kernel set.
        host: worker on the CPU, for references; never sees a GPU.
        sizes: models and amounts for this device.
        machine: hardware and versions, once the environment check knows them.
    """

    def __init__(self, device: str, gpus: int, folder: Path) -> None:
        self.device, self.gpus, self.folder = device, gpus, folder
        self.sizes = GPU if device == "gpu" else CPU
        logs = folder / "logs"
        blind = {"CUDA_VISIBLE_DEVICES": ""}
        self._blind = {} if device == "gpu" else blind
        self.host = Worker("host", logs / "host.log", blind)
        self.here = Worker("here", logs / "here.log", self._blind)
        self.te = Worker("te", logs / "te.log", self._blind)
        self.machine: dict[str, Any] = {}
        self.name = ""
        self._deadline = time.monotonic()

    def begin(self, name: str, seconds: float) -> None:
        """A check starts and has ``seconds``."""
        self.name, self._deadline = name, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left to the check."""
        return self._deadline - time.monotonic()

    def close(self) -> None:
        """End the workers."""
        for worker in (self.here, self.te, self.host):
            worker.stop()

    def do(self, task: str, /, **args: Any) -> Any:
        """A task on the checked device."""
        return self.here.call(task, self.left, **args)

    def overrides_of(self, overrides: Sequence[str], kernels: str = "torch") -> list[str]:
        """Overrides of a run on the checked device: ``overrides`` on the suite's own tokens."""
        return [*QUIET, *self.sizes.device(kernels), *self._data(), *overrides]

    def cpu_overrides(self, overrides: Sequence[str]) -> list[str]:
        """The same on the CPU."""
        return [*QUIET, "device=cpu", *self._data(), *overrides]

    def train(self, name: str, overrides: Sequence[str], kernels: str = "torch") -> Path:
        """Train on the checked device, in its worker; returns the run folder.

        Raises:
            Failed: the run did not finish.
        """
        worker = self.te if kernels == "te" else self.here
        return self._train(worker, name, self.overrides_of(overrides, kernels))

    def train_on_cpu(self, name: str, overrides: Sequence[str]) -> Path:
        """Train on the CPU, in its worker."""
        return self._train(self.host, name, self.cpu_overrides(overrides))

    def launch(
        self,
        name: str,
        overrides: Sequence[str],
        ranks: int = 1,
        *,
        plant: Sequence[str] = (),
        spare: float = 0.0,
    ) -> Ended:
        """Train on the checked device in processes of its own.

        Args:
            spare: seconds of the check's time that the run may not use.
        """
        return launch(
            self.run_folder(name),
            self.overrides_of(overrides),
            ranks,
            self.left - spare,
            plant=plant,
            extra=self._blind,
        )

    def exchange(self, ranks: int) -> dict[str, Any]:
        """Figures of :mod:`moe_train.gpu_check.tasks.exchange` on ``ranks`` ranks."""
        path = self.run_folder("exchange.json")
        arguments = ["-m", "moe_train.gpu_check.tasks.exchange", str(path), self.device]
        code, output = start(path.with_suffix(".log"), arguments, ranks, self.left, self._blind)
        if code != 0:
            raise Failed(f"the exchange ended with exit code {code}\n{output}")
        return read_json(path)

    def run_folder(self, name: str) -> Path:
        """Folder of this check's run ``name``."""
        return self.folder / "runs" / f"{self.name}-{name}"

    def named(self, name: str) -> list[str]:
        """Overrides that give this check's run ``name`` its folder."""
        folder = self.run_folder(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return [f"run.dir={folder.parent}", f"run.name={folder.name}"]

    def _train(self, worker: Worker, name: str, overrides: list[str]) -> Path:
        code = worker.call("train", self.left, overrides=[*overrides, *self.named(name)])
        if code != 0:
            raise Failed(f"training {name} ended with exit code {code}\n{worker.output_tail()}")
        return self.run_folder(name)

    def _data(self) -> list[str]:
        from moe_train.gpu_check.tokens import write_tokens

        prefix = write_tokens(self.folder / "data")
        return [f"data.train=[{prefix}]", "data.tokenizer=byte",
                f"data.cache={self.folder / 'cache'}"]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One check: name, question, GPUs needed, time budget, function."""

    name: str
    asks: str
    """The question, one line."""
    gpus: int
    """GPUs that it needs."""
    seconds: int
    """Time budget; a check that takes longer is ended and has failed."""
    run: Callable[[Bench, Findings], None]
    cpu: bool = False
    """Whether its machinery also runs with --device cpu, at a tiny size."""


def check(
    name: str, gpus: int, seconds: int, *, cpu: bool = False
) -> Callable[[Callable[[Bench, Findings], None]], Check]:
    """Make the decorated function a :class:`Check`; its docstring begins with the question."""
    return lambda run: Check(name, (run.__doc__ or "").split("\n")[0], gpus, seconds, run, cpu)

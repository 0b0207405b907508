"""Two launchers as two nodes, one of which is lost: both are started again and the run goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_train.run_folder.metrics import read
from moe_train.run_folder.status import read_status
from moe_train.testing.layouts import TP2_PP2_EP2
from moe_train.testing.runs import Run
from tests.support.survival import FAULTY, Reference, assert_same_curve, named, refer

pytestmark = [pytest.mark.world, pytest.mark.full]

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
STEPS = 150
WORDS = [*FAULTY, *TP2_PP2_EP2.overrides, f"train.steps={STEPS}", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return refer(tmp_path_factory.mktemp("straight") / "run", WORDS, 4)


class Nodes:
    """Two agents of two ranks each, on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.agents = []
        self.logs = [folder.with_name(f"node{rank}.log") for rank in range(2)]
        for rank, log in enumerate(self.logs):
            with open(log, "ab") as out:
                agent = subprocess.Popen(
                    [str(LAUNCHER), *named(folder, WORDS)],
                    env=os.environ
                    | {
                        "NNODES": "2",
                        "NODE_RANK": str(rank),
                        "NPROC": "2",
                        "PYTHON": sys.executable,
                    }
                    | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.agents.append(agent)

    def wait_for(self, steps: int, metrics: Path) -> None:
        deadline = time.monotonic() + 200
        while len(read(metrics)) < steps:
            assert time.monotonic() < deadline and self.agents[0].poll() is None, self.output()
            time.sleep(0.02)

    def end(self) -> list[int]:
        """Exit codes of the agents, when both are gone and so are their ranks."""
        return [agent.wait(timeout=200) for agent in self.agents]

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def kill_all(agent: int) -> None:
    """The agent and every process below it, as when its machine loses power."""
    family = [psutil.Process(agent), *psutil.Process(agent).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node(lost: int, tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "run"
    nodes = Nodes(folder)
    nodes.wait_for(14, folder / "metrics.jsonl")
    kill_all(nodes.agents[lost].pid)
    codes = nodes.end()
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] != 0
    assert 14 <= len(read(folder / "metrics.jsonl")) < STEPS
    started_again(folder, reference)


def test_a_lost_agent_takes_its_ranks_along(tmp_path: Path, reference: Reference) -> None:
    """They would train on, beside the ranks that replace them: here they save and stop."""
    folder = tmp_path / "run"
    nodes = Nodes(folder)
    nodes.wait_for(14, folder / "metrics.jsonl")
    ranks = psutil.Process(nodes.agents[1].pid).children(recursive=True)
    os.kill(nodes.agents[1].pid, signal.SIGKILL)
    nodes.end()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    status = read_status(folder / "status.json")
    assert status is not None and status.state == "preempted", nodes.output()
    started_again(folder, reference)


def started_again(folder: Path, reference: Reference) -> None:
    nodes = Nodes(folder)
    assert nodes.end() == [0, 0], nodes.output()
    assert "resumed" in nodes.output()
    assert_same_curve(Run([0] * 4, folder, read(folder / "metrics.jsonl")), reference)

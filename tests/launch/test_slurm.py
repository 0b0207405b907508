"""A real Slurm on loopback runs the batch script: to the end, and across a time limit.

Controller, two nodes' daemons and munge belong to the test: their configuration, keys, sockets and
ports lie in its folder, no system service is needed, and they are ended with it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from moe_train.run_folder.metrics import read
from moe_train.run_folder.status import read_status

pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CPUS = 2
TWIN = [
    *("experiment=twin", "device=cpu", "parallel=single", "recompute=none", "batch.global=4"),
    *("model.layers=4", "model.hidden=64", "model.heads=8", "model.head_dim=8"),
    *("model.experts=8", "model.expert_hidden=32", "data.sequence=64", "parallel.expert=2"),
    *("train.steps=12", "train.eval_every=0", "checkpoint.every=100", "checkpoint.keep=1"),
    *("log.wandb=disabled", "log.console=lines"),
]


def program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """The daemons, and the commands that talk to them."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
        }

    def start(self) -> None:
        """Write the configuration and start everything.

        Raises:
            OSError, AssertionError: what did not start, and its log.
        """
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(self._configuration())
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        munge = [f"--{part}-file={self.folder / f'munge.{part}'}" for part in ("key", "pid")]
        munge += [f"--seed-file={self.folder / 'seed'}", f"--socket={self.folder / 'munge'}"]
        self._daemon("munged", "--foreground", "--force", "--num-threads=1", *munge)
        self._wait(lambda: (self.folder / "munge").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for number in range(self.nodes):
            self._daemon("slurmd", "-D", "-N", f"n{number}")
        ready = f"State=IDLE\n{self.nodes}"
        self._wait(lambda: self._idle() == ready, "slurmctld and slurmd")

    def _configuration(self) -> str:
        user, host = psutil.Process().username(), socket.gethostname()
        ports = iter(free_ports(self.nodes + 1))
        folder = self.folder
        # A job may start again when its credential is no longer valid: after cred_expire.
        lines = f"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={next(ports)}
            SlurmUser={user}
            SlurmdUser={user}
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge,cred_expire=5
            CredType=cred/munge
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            MpiDefault=none
            SwitchType=switch/none
            JobAcctGatherType=jobacct_gather/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            ReturnToService=2
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool.%n
            SlurmctldPidFile={folder}/ctld.pid
            SlurmdPidFile={folder}/slurmd.%n.pid
            SlurmctldLogFile={folder}/ctld.log
            SlurmdLogFile={folder}/slurmd.%n.log
            PartitionName=all Nodes=n[0-{self.nodes - 1}] Default=YES MaxTime=INFINITE
        """.split("\n")
        nodes = [
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(ports)} "
            f"CPUs={CPUS} State=UNKNOWN"
            for number in range(self.nodes)
        ]
        return "\n".join([*nodes, *(line.strip() for line in lines), ""])

    def _daemon(self, name: str, *arguments: str) -> None:
        path = program(name)
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments],
                    env=self.env,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                )
            )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + 30
        while not condition():
            ended = [d.args for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > until:
                output = "".join(
                    path.read_text(errors="replace")[-1500:]
                    for path in sorted(self.folder.glob("*.out"))
                    + sorted(self.folder.glob("*.log"))
                )
                raise AssertionError(f"{what} did not start; ended: {ended}\n{output}")
            time.sleep(0.1)

    def _idle(self) -> str:
        shown = self.call("scontrol", "show", "node", "--oneliner", check=False)
        return f"State=IDLE\n{len(re.findall(r'State=IDLE ', shown))}"

    def call(self, name: str, *arguments: str, check: bool = True, **env: str) -> str:
        """Output of one of Slurm's commands."""
        path = program(name)
        assert path is not None
        done = subprocess.run(
            [path, *arguments], env={**self.env, **env}, capture_output=True, text=True, cwd=ROOT
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, options: list[str], more: list[str], **env: str) -> int:
        """`sbatch launch/slurm.sbatch`; returns the job's number."""
        output = f"--output={self.folder}/job-%j.out"
        script = str(ROOT / "launch" / "slurm.sbatch")
        message = self.call("sbatch", "--parsable", output, *options, script, *more, **env)
        return int(message.strip())

    def facts(self, job: int) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        shown = self.call("scontrol", "show", "job", "--oneliner", str(job))
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def output(self, job: int) -> str:
        """What the job has printed, all its starts together."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: int, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for ``condition``; AssertionError with the job's output where it does not come."""
        until = time.monotonic() + seconds
        while not condition():
            state = self.facts(job)
            assert time.monotonic() < until, f"{what}: {state}\n{self.output(job)}"
            time.sleep(0.2)

    def finished(self, job: int, seconds: float = 400) -> str:
        """Wait for the job's last end; returns Slurm's word for it."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(job, lambda: self.facts(job)["JobState"] in final, seconds, "no end")
        return self.facts(job)["JobState"]

    def stop(self) -> None:
        """End the jobs and the daemons that were started here."""
        if len(self._daemons) > 1:
            self.call("scancel", "--me", check=False)
            time.sleep(1)
        for daemon in reversed(self._daemons):
            # Steps' own daemons are children of slurmd until it ends.
            below = psutil.Process(daemon.pid).children(recursive=True) if not daemon.poll() else []
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            for process in below:
                if process.is_running():
                    process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if program(name) is None]:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (Debian: slurm-wlm, munge)")
    result = Slurm(tmp_path_factory.mktemp("slurm"), nodes=2)
    try:
        # One that is installed and does not start is a failure, and says why.
        result.start()
        yield result
    finally:
        result.stop()


def steps(folder: Path) -> list[dict[str, object]]:
    """Training lines of a run so far."""
    path = folder / "metrics.jsonl"
    return [r for r in read(path) if "loss" in r] if path.exists() else []


def ranks(name: str) -> list[psutil.Process]:
    """The ranks of a run, without torchrun's agents."""
    results = []
    for process in psutil.process_iter(["cmdline"]):
        overrides = process.info["cmdline"] or []
        if f"run.name={name}" in overrides and "train.py" in overrides and "-m" not in overrides:
            results.append(process)
    return results


@pytest.fixture(scope="module")
def whole(slurm: Slurm) -> Path:
    """The run folder of a job that nothing disturbed: one node, two ranks."""
    overrides = [*TWIN, f"run.dir={slurm.folder}", "run.name=whole"]
    job = slurm.submit(["--nodes=1", "--time=10"], overrides, NPROC="2")
    assert slurm.finished(job) == "COMPLETED", slurm.output(job)
    return slurm.folder / "whole"


def test_a_job_runs_to_its_end(slurm: Slurm, whole: Path) -> None:
    status = read_status(whole / "status.json")
    assert status is not None and (status.state, status.step) == ("finished", 12)
    assert [record["step"] for record in steps(whole)] == list(range(1, 13))


def test_a_time_limit_is_survived_bitwise_on_two_nodes(slurm: Slurm, whole: Path) -> None:
    """Three minutes a start, told 90 to 120 seconds before; the ranks pause until they are told."""
    run = slurm.folder / "limited"
    overrides = [*TWIN, f"run.dir={slurm.folder}", "run.name=limited"]
    job = slurm.submit(
        ["--nodes=2", "--time=3", "--signal=B:USR1@90"],
        overrides,
        NPROC="1",
        MASTER_ADDR="127.0.0.1",
        MAX_RESTARTS="1",
    )
    slurm.wait(job, lambda: len(steps(run)) >= 3, 100, "no third step")
    paused = ranks("limited")
    assert len(paused) == 2
    for process in paused:
        process.suspend()
    assert len(steps(run)) < 12, "it was over before it could be interrupted"
    args = "sending the ranks a stop signal"
    slurm.wait(job, lambda: args in slurm.output(job), 120, "Slurm gave no signal")
    for process in paused:
        process.resume()
    slurm.wait(job, lambda: "requeued" in slurm.output(job), 60, "not queued again")
    stopped = read_status(run / "status.json")
    assert stopped is not None and 3 <= stopped.step < 12
    assert slurm.finished(job) == "COMPLETED", slurm.output(job)
    output = slurm.output(job)
    assert int(slurm.facts(job)["Restarts"]) >= 1
    assert f"resumed {run}/checkpoints/step_{stopped.step:08d} at step {stopped.step}" in output
    # torchrun starts preempted ranks again: they end at once and leave the run as it is.
    assert "is not taken up by a restart of its ranks" in output
    straight, survived = steps(whole), steps(run)
    for name in ("step", "loss_hex", "grad_norm_hex", "consumed_samples"):
        assert [r[name] for r in survived] == [r[name] for r in straight]
    print(output)


def test_a_job_that_saves_nothing_is_not_queued_for_ever(slurm: Slurm) -> None:
    run = slurm.folder / "idle"
    overrides = [*TWIN, "train.steps=100000", "checkpoint.every=0"]
    overrides += [f"run.dir={slurm.folder}", "run.name=idle"]
    job = slurm.submit(["--nodes=1", "--time=10"], overrides, NPROC="2", MAX_REQUEUES="0")
    slurm.wait(job, lambda: bool(steps(run)), 100, "no step")
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.finished(job, 60) == "FAILED"
    assert slurm.facts(job)["ExitCode"] == "75:0"
    assert "1 starts in a row wrote no new checkpoint" in slurm.output(job)


def test_ranks_that_are_told_to_stop_save_and_end_the_job(slurm: Slurm) -> None:
    run = slurm.folder / "ended"
    overrides = [*TWIN, "train.steps=100000", f"run.dir={slurm.folder}", "run.name=ended"]
    job = slurm.submit(["--nodes=1", "--time=10"], overrides, NPROC="2")
    slurm.wait(job, lambda: bool(steps(run)), 100, "no step")
    slurm.call("scancel", "--signal=USR1", str(job))
    assert slurm.finished(job, 60) == "FAILED"
    assert slurm.facts(job)["ExitCode"] == "75:0" and slurm.facts(job)["Restarts"] == "0"
    status = read_status(run / "status.json")
    assert status is not None and status.state == "preempted"
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert saved == [f"step_{status.step:08d}"]

"""The shell side: which Python is found, and what launchers hand to torchrun and to Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def interpreter(path: Path, *, version: bool = True, modules: bool = True) -> Path:
    """A stand-in for Python that answers the finder's two questions, then prints its own path."""
    return script(
        path,
        f"""case "$2" in
          *version_info*) exit {0 if version else 1} ;;
          *ensurepip*) exit {0 if modules else 1} ;;
          *) echo "$0" ;;
        esac""",
    )


def find(home: Path, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    # bash and uname live beside the system's own Python: only a folder of ours may be on PATH.
    return subprocess.run(
        ["/bin/bash", str(ROOT / "launch" / "find_python.sh")],
        env={"HOME": str(home), "PATH": str(path or home / "empty"), **env},
        capture_output=True,
        text=True,
    )


def test_path_comes_first_and_old_versions_are_passed_over(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin" / "python3.12", version=False)
    wanted = interpreter(tmp_path / "bin" / "python3")
    interpreter(tmp_path / ".pyenv" / "versions" / "3.13.0" / "bin" / "python3")
    assert find(tmp_path, tmp_path / "bin").stdout.strip() == str(wanted)


@pytest.mark.parametrize(
    "place",
    [
        ".pyenv/versions/3.12.7/bin/python3",
        ".local/share/uv/python/cpython-3.13.1-linux-x86_64-gnu/bin/python3",
    ],
)
def test_versions_off_path_are_found(tmp_path: Path, place: str) -> None:
    wanted = interpreter(tmp_path / place)
    assert find(tmp_path).stdout.strip() == str(wanted)


def test_pyenv_root_and_python_variables_are_respected(tmp_path: Path) -> None:
    pyenv = interpreter(tmp_path / "elsewhere" / "versions" / "3.12.7" / "bin" / "python3")
    root = str(tmp_path / "elsewhere")
    assert find(tmp_path, PYENV_ROOT=root).stdout.strip() == str(pyenv)
    mine = interpreter(tmp_path / "mine")
    assert find(tmp_path, PYENV_ROOT=root, PYTHON=str(mine)).stdout.strip() == str(mine)


def test_without_any_python_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin" / "python3", version=False)
    done = find(tmp_path, tmp_path / "bin")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "3.12" in done.stderr


def test_a_python_without_ensurepip_is_named(tmp_path: Path) -> None:
    broken = interpreter(tmp_path / "bin" / "python3.12", modules=False)
    done = find(tmp_path, tmp_path / "bin")
    assert done.returncode == 1
    assert str(broken) in done.stderr and "python3-venv" in done.stderr
    whole = interpreter(tmp_path / "bin" / "python3.13")
    assert find(tmp_path, tmp_path / "bin").stdout.strip() == str(whole)


def launch(tmp_path: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
    python = script(tmp_path / "python", 'echo "threads=$OMP_NUM_THREADS"; printf "%s\\n" "$@"')
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    return subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh"), *overrides],
        env={**clean, "PYTHON": str(python), **env},
        capture_output=True,
        text=True,
    )


def test_one_node_gets_a_rendezvous_of_its_own(tmp_path: Path) -> None:
    done = launch(tmp_path, "train.steps=3", "run.name=a b", NPROC="2")
    expected = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py"
    assert done.stdout.splitlines() == [
        "threads=1",
        *expected.split(),
        "train.steps=3",
        "run.name=a b",
    ]


def test_several_nodes_name_their_master(tmp_path: Path) -> None:
    done = launch(tmp_path, NPROC="4", NNODES="2", NODE_RANK="1", MASTER_ADDR="node0")
    expected = "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500"
    expected += " --nproc-per-node 4 train.py"
    assert done.stdout.splitlines()[3:] == [
        *expected.split(),
    ]


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_nodes_without_their_facts_are_refused(tmp_path: Path, missing: str) -> None:
    env = {"NODE_RANK": "0", "MASTER_ADDR": "node0"}
    del env[missing]
    done = launch(tmp_path, NPROC="4", NNODES="2", **env)
    assert done.returncode != 0 and missing in done.stderr and not done.stdout


def test_restarts_are_bounded(tmp_path: Path) -> None:
    """Ranks that fail in the same place again and again: three starts and no fourth."""
    done = subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh"), "train.stps=3", f"run.dir={tmp_path}"],
        env={**os.environ, "PYTHON": sys.executable, "NPROC": "1", "MAX_RESTARTS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert done.stderr.count("moe_train: 1 config error") == 3, done.stderr
    # torchrun's closing report has it as well.
    assert "did you mean train.steps" in done.stderr.partition("Root Cause")[2], done.stderr


AGENT = """
import pathlib, signal, subprocess, sys, time
here = pathlib.Path(sys.argv[1])
if len(sys.argv) > 2:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    (here / "listening").touch()
    while not heard:
        time.sleep(0.01)
    signal.signal(signal.SIGUSR1, before)
    sys.exit(75)
code = subprocess.run([sys.executable, __file__, str(here), "rank"]).returncode
(here / "seen").write_text(str(code))
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGUSR1, True)],
)
def test_a_node_s_task_passes_requests_to_stop_to_the_ranks_alone(
    tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    """Slurm signals the task or, with some trackers, every process below it (USR1)."""
    (tmp_path / "agent.py").write_text(AGENT)
    python = script(
        tmp_path / "python", f'exec {sys.executable} "{tmp_path}/agent.py" "{tmp_path}"'
    )
    task = subprocess.Popen(
        [str(ROOT / "launch" / "slurm_node.sh")],
        env={**os.environ, "SLURM_NODEID": "0", "PYTHON": str(python), "NPROC": "1"},
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "listening").exists():
            assert time.monotonic() < until and task.poll() is None
            time.sleep(0.05)
        os.kill(task.pid, number) if not everyone else os.killpg(task.pid, number)
        assert task.wait(30) == 1
    finally:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
    assert (tmp_path / "seen").read_text() == "75"


class Batch:
    """The batch script in a checkout of its own, between stand-ins for Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "slurm-7"
        script(folder / "launch" / "slurm_node.sh", "exit 9")
        noted = f'echo "$@" >>"{folder}/scontrol"'
        script(folder / "bin" / "scontrol", f"{noted}; echo node0; echo node1")

    def start(self, srun: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run it; ``srun`` is what happens in place of the step."""
        args = f'printf "%s\\n" "$@" >"{self.folder}/srun"; env >"{self.folder}/env"'
        script(self.folder / "bin" / "srun", f"{args}; run={self.run}; {srun}")
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        facts = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(self.folder), "PATH": path}
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments],
            env={**facts, "HOME": str(self.folder), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> int:
        return self.lines("scontrol").count("requeue 7")


PREEMPTED = """echo '{"state": "preempted", "step": 3, "reason": ""}' >$run/status.json; exit 1"""
LIMIT = f"kill -USR1 $PPID; sleep 0.3; {PREEMPTED}"
SAVED = f"mkdir -p $run/checkpoints/step_0000000${{SLURM_RESTART_COUNT:-0}}; {LIMIT}"


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_a_job_names_its_run_by_its_number(batch: Batch) -> None:
    done = batch.start("exit 0", "train.steps=3", "run.dir=x y")
    assert done.returncode == 0, done.stderr
    assert batch.lines("srun")[-4:] == [
        *("launch/slurm_node.sh", "run.dir=x y", "run.name=slurm-7", "train.steps=3"),
    ]
    assert batch.requeued == 0


def test_nodes_and_cores_reach_the_step(batch: Batch) -> None:
    facts = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    batch.start("exit 0", SLURM_CPUS_PER_TASK="12", NCCL_DEBUG="INFO", **facts)
    wanted = {"NNODES=2", "MASTER_ADDR=node0", "MASTER_PORT=15007", "SRUN_CPUS_PER_TASK=12"}
    assert wanted | {"NCCL_DEBUG=INFO"} <= set(batch.lines("env"))


def test_containers_wrap_the_ranks(batch: Batch) -> None:
    image = {"CONTAINER_IMAGE": "moe.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    mounts = f"{batch.folder}:{batch.folder},/data:/data"
    batch.start("exit 0", CONTAINER="pyxis", **image)
    assert {"--container-image=moe.sqsh", f"--container-mounts={mounts}"} <= set(
        batch.lines("srun")
    )
    assert "PYTHON=python3" in batch.lines("env")
    batch.start("exit 0", CONTAINER="apptainer", **image)
    at = batch.lines("srun").index("apptainer")
    assert batch.lines("srun")[at : at + 8] == [
        *("apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(batch.folder), "moe.sqsh"),
    ]
    for wrong in ({"CONTAINER": "docker", **image}, {"CONTAINER": "pyxis"}):
        done = batch.start("exit 0", **wrong)
        assert done.returncode != 0 and "CONTAINER" in done.stderr


def test_a_time_limit_queues_the_job_again(batch: Batch) -> None:
    done = batch.start(SAVED)
    assert batch.requeued == 1 and "requeued" in done.stdout, done.stdout + done.stderr


def test_failures_and_stops_that_slurm_did_not_ask_for_end_the_job(batch: Batch) -> None:
    failed = PREEMPTED.replace("preempted", "failed")
    assert batch.start(failed).returncode == 1
    assert batch.start("exit 1").returncode == 1
    assert batch.start(f"kill -USR1 $PPID; sleep 0.3; {failed}").returncode == 1
    assert batch.start(PREEMPTED).returncode == 75
    assert batch.start(f"kill -TERM $PPID; {LIMIT}").returncode == 75
    assert batch.requeued == 0


def test_starts_without_progress_are_bounded(batch: Batch) -> None:
    for count in range(3):
        batch.start(LIMIT, SLURM_RESTART_COUNT=str(count), MAX_REQUEUES="2")
    assert batch.requeued == 2
    # A start that Slurm orders itself, after a lost node, does not even begin.
    (batch.folder / "srun").unlink()
    done = batch.start("exit 0", SLURM_RESTART_COUNT="3", MAX_REQUEUES="2")
    assert done.returncode == 75 and not batch.lines("srun")


def test_progress_allows_any_number_of_starts(batch: Batch) -> None:
    for count in range(6):
        batch.start(SAVED, SLURM_RESTART_COUNT=str(count), MAX_REQUEUES="1")
    assert batch.requeued == 6


def test_a_job_goes_on_from_its_own_checkpoint(batch: Batch) -> None:
    """What the first start resumed from would throw the job's own progress away."""
    batch.start(SAVED, "checkpoint.resume=/elsewhere")
    assert batch.lines("srun")[-1] == "checkpoint.resume=/elsewhere"
    batch.start("exit 0", "checkpoint.resume=/elsewhere", SLURM_RESTART_COUNT="1")
    assert batch.lines("srun")[-1] == "run.name=slurm-7"


def test_what_cannot_go_on_is_refused(batch: Batch, tmp_path: Path) -> None:
    assert "--multirun cannot be resumed" in batch.start("exit 0", "-m", "optim.lr=1,2").stderr
    done = batch.start("exit 0", MOE_TRAIN_HOME=str(tmp_path / "bin"))
    assert done.returncode == 2 and "MOE_TRAIN_HOME" in done.stderr

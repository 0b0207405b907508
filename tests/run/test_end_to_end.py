"""Whole programs from the shell: quiet consoles, sweeps, signals, and no override at all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import EXIT_CONFIG, EXIT_PREEMPTED
from moe_train.run_folder.metrics import read
from moe_train.testing.runs import train_run
from moe_train.testing.world import run_world

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32", "log.wandb=disabled"),
]
LINES = {
    "job": r"job \d of \d: .*",
    "experiment": r"experiment \w+( \(auto: .+\))?",
    "layout": r"layout \S+ on \d rank\(s\): tensor .*",
    "kernels": r"kernels torch \(.+\)",
    "step": r"step \d+/\d+  loss [\d.]+  grad .*",
    "validation": r"step \d+  validation loss [\d.]+  \(unigram entropy [\d.]+\)",
    "summary": r"(run|training loss|validation loss|tokens/s|MFU|wall time|run folder) +\S.*",
}


def shell(folder: Path, argv: list[str], world: int = 1) -> subprocess.CompletedProcess[str]:
    """``python train.py`` or ``torchrun train.py`` in an empty working folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.run(
        [sys.executable, *(launcher if world > 1 else []), str(TRAIN), *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        # torchrun warns where this is unset; make and the launchers set it.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def unknown_lines(text: str) -> list[str]:
    """Console lines that are not of ours."""
    known = re.compile("|".join(LINES.values()))
    return [line for line in text.splitlines() if line.strip() and not known.fullmatch(line)]


@pytest.mark.world
def test_sweep_under_torchrun_each_job_its_own_folder_and_a_quiet_console(tmp_path: Path) -> None:
    argv = ["-m", "optim.lr=1e-3,3e-3", "train.steps=2", *SMALL]
    argv += ["parallel.expert=2", "train.eval_every=2", "train.eval_batches=1"]
    done = shell(tmp_path, argv, world=2)
    assert done.returncode == 0, done.stderr
    assert unknown_lines(done.stdout) == []
    assert done.stderr == ""
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name.partition("-optim.lr-")[2] for run in runs] == ["0.001", "0.003"]
    losses = []
    for run in runs:
        assert json.loads((run / "status.json").read_text())["state"] == "finished"
        steps = [record for record in read(run / "metrics.jsonl") if "loss" in record]
        assert [record["step"] for record in steps] == [1, 2]
        losses.append([record["loss_hex"] for record in steps])
        assert {log.name for log in (run / "logs").glob("rank_*")} == {"rank_0.log", "rank_1.log"}
    # Nothing of the first job is left in the second: it starts where the first started.
    assert losses[0][0] == losses[1][0]
    # What libraries had to say before the folder was known is not lost.
    for rank in (0, 1):
        text = (runs[0] / "logs" / f"rank_{rank}.log").read_text()
        assert "UserWarning" in text
        assert re.search(
            rf"^[\d-]+ [\d:,]+ rank {rank} INFO moe_train\.run\.main: kernels ", text, re.M
        )
    # What rank 0 shows of a run is in its log as well.
    shown = (runs[0] / "logs" / "rank_0.log").read_text()
    for line in done.stdout.split("job 2 of 2")[0].splitlines():
        assert line in shown or re.fullmatch(LINES["summary"], line) or not line.strip(), line


@pytest.mark.world
@pytest.mark.parametrize(("key", "first", "second"), [("experts", 4, 8), ("layers", 2, 3)])
def test_sweep_in_one_process_equals_runs_of_their_own(
    tmp_path: Path, key: str, first: int, second: int
) -> None:
    """Two jobs share a process: global state that is not torn down would show in the second."""
    fixed = [word for word in QUIET if f"model.{key}=" not in word]
    argv = ["-m", f"model.{key}={first},{second}", "train.steps=3", f"run.dir={tmp_path}"]
    swept = run_world(_main, 1, [*argv, "run.name=s", *fixed], log=tmp_path / "log")
    assert swept == [0], (tmp_path / "log").read_text()
    alone = train_run(tmp_path / "alone", [*fixed, "train.steps=3", f"model.{key}={second}"])
    assert alone.codes == [0]
    records = read(tmp_path / f"s-model.{key}-{second}" / "metrics.jsonl")
    for name in ("loss_hex", "grad_norm_hex", "aux_loss", "load_imbalance"):
        assert [record[name] for record in records if "loss" in record] == alone.column(name)
    assert len(list((tmp_path / f"s-model.{key}-{first}" / "checkpoints").iterdir())) == 2


QUIET = [*SMALL, "device=cpu", "checkpoint.every=2", "train.eval_every=0", "log.console=none"]


def _main(rank: int, world: int, argv: list[str]) -> int:
    from moe_train.run.main import main

    return main(argv)


@pytest.mark.world
def test_a_finished_run_leaves_no_model_behind(tmp_path: Path) -> None:
    """On a GPU the next job of a sweep would find its memory taken."""
    overrides = [*QUIET, "train.steps=2", f"run.dir={tmp_path}", "run.name=s"]
    assert run_world(_models_left, 1, overrides, log=tmp_path / "log") == [0]


def _models_left(rank: int, world: int, argv: list[str]) -> int:
    import gc
    import weakref

    from moe_train.run.main import main
    from moe_train.train import loop

    plain, models = loop.train_step, []

    def watched(engine: Any, *args: Any, **how: Any) -> Any:
        models.append(weakref.ref(engine.chunks[0]))
        return plain(engine, *args, **how)

    setattr(loop, "train_step", watched)  # noqa: B010 - mypy sees a function, not a variable
    assert main(argv) == 0
    assert len(models) == 2
    gc.collect()
    return sum(model() is not None for model in models)


def test_a_refused_job_does_not_stop_the_sweep(tmp_path: Path) -> None:
    argv = ["-m", "optim.lr=-1,1e-3", "train.steps=1", f"run.dir={tmp_path}", "run.name=s"]
    argv += QUIET
    codes = run_world(_main, 1, argv, log=tmp_path / "log")
    assert codes == [EXIT_CONFIG]
    assert (tmp_path / "log").read_text().count("optim.lr: expected number >= 0, got -1") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["s-optim.lr-0.001"]


def _told_to_stop(rank: int, world: int, argv: list[str], metrics: str) -> int:
    """Rank 1 alone gets the signal, in the middle of the run."""
    from moe_train.run.main import main

    def after_some_steps() -> None:
        while not Path(metrics).exists() or len(read(Path(metrics))) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        threading.Thread(target=after_some_steps, daemon=True).start()
    return main(argv)


@pytest.mark.world
def test_sigterm_saves_on_all_ranks_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    overrides = [*SMALL, "parallel.expert=2", "train.steps=30", "train.eval_every=0"]
    overrides += ["checkpoint.every=100", "checkpoint.keep=1"]
    straight = train_run(tmp_path / "straight", overrides, world=2)
    assert straight.codes == [0, 0]
    folder = tmp_path / "stopped"
    argv = ["device=cpu", "log.console=none", f"run.dir={tmp_path}", "run.name=stopped", *overrides]
    log = tmp_path / "stopped.log"
    codes = run_world(_told_to_stop, 2, argv, str(folder / "metrics.jsonl"), log=log)
    assert codes == [EXIT_PREEMPTED] * 2
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "preempted" and 4 <= status["step"] < 30
    assert "its state is saved" in status["reason"]
    assert "Traceback" not in log.read_text()
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == [f"step_{status['step']:08d}"]
    resumed = train_run(folder, overrides, world=2)
    assert resumed.codes == [0, 0]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert resumed.column("step") == list(range(1, 31))
    for name in ("loss_hex", "grad_norm_hex", "consumed_samples"):
        assert resumed.column(name) == straight.column(name)


@pytest.mark.world
def test_a_stop_ends_the_whole_sweep(tmp_path: Path) -> None:
    argv = ["-m", "optim.lr=1e-3,2e-3", "train.steps=500", f"run.dir={tmp_path}", "run.name=s"]
    argv += [*QUIET, "model.experts=4", "parallel.expert=2"]
    metrics = str(tmp_path / "s-optim.lr-0.001" / "metrics.jsonl")
    codes = run_world(_told_to_stop, 2, argv, metrics, log=tmp_path / "log")
    assert codes == [EXIT_PREEMPTED] * 2
    assert not (tmp_path / "s-optim.lr-0.002").exists()


def test_faults_from_the_shell_have_their_exit_code_and_no_traceback(tmp_path: Path) -> None:
    done = shell(tmp_path, ["train.stps=2"])
    assert done.returncode == EXIT_CONFIG
    assert "did you mean train.steps" in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.world
@pytest.mark.parametrize(
    # Each rank of these imports torch anew and trains the twin.
    "world",
    [1, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 4, 8))],
)
def test_default_run(world: int, tmp_path: Path) -> None:
    """No override but the length: device, experiment and layout are chosen, and said."""
    done = shell(tmp_path, ["train.steps=2"], world)
    assert done.returncode == 0, done.stdout + done.stderr
    assert unknown_lines(done.stdout) == [] and done.stderr == ""
    for name in ("experiment", "layout", "kernels", "step", "validation", "summary"):
        assert re.search(LINES[name], done.stdout), name
    [run] = (tmp_path / "runs").iterdir()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["kernels"]["name"] == "torch"
    assert plan["layout"]["world"] == world
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert {path.name for path in run.iterdir()} >= {
        *("config.yaml", "plan.json", "metrics.jsonl", "status.json"),
        *("checkpoints", "experts", "logs"),
    }


def test_the_run_that_prepares_the_corpus_is_no_other_than_the_next(tmp_path: Path) -> None:
    code = (
        "import sys; from moe_train.run.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 10 * bool({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    overrides = [*SMALL, "device=cpu", "train.steps=3", "train.eval_every=0", "data.tokenizer=byte"]
    overrides += [f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", "log.console=none"]
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", code, *overrides, f"run.name={name}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (name, done.returncode, done.stderr)
    first, second = (read(tmp_path / name / "metrics.jsonl") for name in ("first", "second"))
    assert len(first) == 3
    for one, two in zip(first, second, strict=True):
        assert (one["loss_hex"], one["grad_norm_hex"]) == (two["loss_hex"], two["grad_norm_hex"])

"""Hostile configs, secrets that stay where they are, and one job at a time in a run folder."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.compose import compose, typed
from moe_train.config.files import MAX_BYTES, read_yaml
from moe_train.config.secrets import secrets
from moe_train.errors import EXIT_CONFIG, ConfigError
from moe_train.planner.claims import document
from moe_train.run.main import main
from moe_train.run_folder.lock import NAME, lock_run_folder
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world

SECRET = "0123456789abcdef0123456789abcdef01234567"
SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.eval_every=0", "checkpoint.every=2", "train.steps=2"),
]


class Touch:
    """Unpickled or called, it creates a folder: code ran."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "override",
    [
        "+model._target_=os.mkdir",
        "+megatron.transformer={_target_: os.mkdir, path: CANARY}",
        "+backend.nccl={x: {_target_: os.mkdir, _args_: [CANARY]}}",
        "+train={_target_: subprocess.check_call, args: [mkdir, CANARY]}",
        "hydra/launcher=evil",
        "+hydra.launcher._target_=os.mkdir",
        "hydra.searchpath=[file://CANARY]",
        "hydra.run.dir=CANARY",
    ],
)
def test_code_in_overrides(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    argv = [override.replace("CANARY", str(canary)), f"run.dir={tmp_path}/runs", "device=cpu"]
    assert main(argv) == EXIT_CONFIG
    output = capsys.readouterr().err
    assert "fix:" in output and "Traceback" not in output
    assert not list(tmp_path.iterdir())


def hostile_yaml(canary: Path) -> dict[str, str]:
    """YAML that an unsafe loader would turn into calls, and YAML that would fill the memory."""
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    return {
        "apply": f"!!python/object/apply:os.mkdir ['{canary}']",
        "new": f"!!python/object/new:os.mkdir ['{canary}']",
        "nested": f"model: {{hidden: !!python/object/apply:os.mkdir ['{canary}']}}",
        "name": "model: !!python/name:os.mkdir",
        "module": "model: !!python/module:os",
        "aliases": bomb,
        "itself": "a: &a [*a]",
        "deep": "[" * 5000,
        "digits": "a: " + "9" * 5000,
        "not text": "a: \x00",
    }


@pytest.mark.parametrize("case", hostile_yaml(Path()))
def test_yaml_is_data(case: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "file.yaml"
    path.write_text(hostile_yaml(canary)[case])
    with pytest.raises(ConfigError):
        read_yaml(path, "field")
    with pytest.raises(ConfigError):
        document.load(path)
    assert not canary.exists()


def test_files_that_are_no_yaml(tmp_path: Path) -> None:
    path, canary = tmp_path / "file.yaml", tmp_path / "canary"
    path.write_bytes(pickle.dumps(Touch(canary)))
    with pytest.raises(ConfigError, match=r"field: .*file\.yaml"):
        read_yaml(path, "field")
    with path.open("r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="not a regular file of at most"):
        read_yaml(path, "field")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file of at most"):
        read_yaml(path, "field")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["config.yaml", "plan.json"])
def test_hostile_files_of_a_run_that_is_evaluated(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_train.commands.evaluate import evaluate_main

    run, canary = tmp_path / "runs/r", tmp_path / "canary"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    (run / "plan.json").write_text('{"batch": {"sequences_per_step": 2}}')
    for content in (pickle.dumps(Touch(canary)), hostile_yaml(canary)["apply"].encode()):
        (run / name).write_bytes(content)
        assert evaluate_main([str(run)]) == EXIT_CONFIG
        output = capsys.readouterr().err
        assert name in output and "Traceback" not in output
    assert not canary.exists()


def test_run_names_stay_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("../x", "/tmp/x", "..", "a/b"):
        argv = [f"run.dir={tmp_path}/runs", f"run.name='{name}'", "device=cpu", *SMALL]
        assert main(argv) == EXIT_CONFIG
        assert "is not a folder name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_which_variables_are_secret() -> None:
    environment = {
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": "hf_" + SECRET,
        "db_password": "long enough",
        "GOOGLE_APPLICATION_CREDENTIALS": "/etc/where/it/lies",
        "SHORT_KEY": "1",
        "HOME": "/home/somebody",
    }
    assert set(secrets(environment)) == {"WANDB_API_KEY", "HF_TOKEN", "db_password"}


@pytest.mark.parametrize(
    "override",
    [
        "run.name=${oc.env:WANDB_API_KEY}",
        "run.name='x-${oc.env:WANDB_API_KEY}'",
        "data.train=['${oc.env:\"WANDB_API_KEY\"}']",
        "train.steps=${oc.env:WANDB_API_KEY}",
        f"backend.nccl={{DEBUG_FILE: {SECRET}}}",
    ],
)
def test_secrets_do_not_enter_a_config(
    override: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert main([override, f"run.dir={tmp_path}/runs", "device=cpu"]) == EXIT_CONFIG
    output = capsys.readouterr()
    assert "WANDB_API_KEY" in output.err and SECRET not in output.err + output.out
    assert not list(tmp_path.iterdir())


def _with_key(rank: int, world: int, overrides: list[str], url: str) -> int:
    os.environ.pop("WANDB_MODE", None)
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": SECRET, "HF_TOKEN": "hf_" + SECRET}
    return main(overrides)


@pytest.mark.world
def test_secrets_do_not_enter_a_run_folder(tmp_path: Path) -> None:
    """A run with a key, whose W&B cannot reach its server and so has much to log."""
    log = tmp_path / "log"
    overrides = [
        "device=cpu",
        "log.console=lines",
        *SMALL,
        f"run.dir={tmp_path}/runs",
        "run.name=r",
    ]
    url = "http://127.0.0.1:9"
    codes = run_world(_with_key, 1, [*overrides, "log.wandb=online"], url, log=log)
    assert codes == [0], log.read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    names = {path.name for path in files}
    assert {"config.yaml", "plan.json", "metrics.jsonl", "rank_0.log", "manifest.json"} <= names
    assert any("wandb" in str(path.relative_to(tmp_path)) for path in files)
    leaks = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
    assert not leaks
    # The search itself finds what is there.
    assert b"checkpoint" in (tmp_path / "runs/r/config.yaml").read_bytes()


def test_typed_mapping_refuses_code() -> None:
    with pytest.raises(ConfigError, match="_target_"):
        typed({"model": {"_target_": "os.mkdir"}})
    with pytest.raises(ConfigError):
        compose(["model.hidden=" + "9" * 5000])


HOLDER = """
import sys, time
from pathlib import Path
from moe_train.run_folder.lock import lock_run_folder
lock = lock_run_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_second_job_is_refused_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on .*\n.*run.name=NAME"):
            lock_run_folder(tmp_path, timeout=0.0)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / NAME).read_text()
    lock = lock_run_folder(tmp_path, timeout=0.0)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        lock_run_folder(tmp_path, timeout=0.0)
    lock.release()
    lock.release()
    lock_run_folder(tmp_path, timeout=0.0).release()


def test_a_restart_waits_for_the_job_that_it_replaces(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("sleep(60)", "sleep(1)"), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        lock_run_folder(tmp_path, timeout=30.0).release()


def test_a_file_system_without_locks_is_named_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    for _ in range(2):
        # No marker file either: a killed job would leave it behind.
        lock_run_folder(tmp_path, timeout=0.0).release()
    assert caplog.text.count("has no locks (Function not implemented)") == 2


def test_the_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot be opened"):
        lock_run_folder(tmp_path)
    assert not (tmp_path / "victim").exists()


@pytest.mark.world
def test_two_jobs_in_one_run_folder(tmp_path: Path) -> None:
    """The second one ends on all its ranks and leaves the folder as it is."""
    folder = tmp_path / "runs/r"
    folder.mkdir(parents=True)
    held = lock_run_folder(folder)
    log = tmp_path / "log"
    overrides = [*QUIET, *SMALL, f"run.dir={tmp_path}/runs", "run.name=r", "parallel.expert=2"]
    begun = time.monotonic()
    assert run_world(_plain, 2, overrides, log=log) == [EXIT_CONFIG] * 2
    output = log.read_text()
    assert output.count(f"another job trains in {folder}: process {os.getpid()} on") == 1
    assert "Traceback" not in output and time.monotonic() - begun < 200
    assert not (folder / "status.json").exists() and not (folder / "metrics.jsonl").exists()
    held.release()
    assert run_world(_plain, 2, overrides, log=log) == [0, 0], log.read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def _plain(rank: int, world: int, overrides: list[str]) -> int:
    return main(overrides)

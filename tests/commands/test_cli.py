"""The console script: help, dispatch, exit codes, and a plan without torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from moe_train import cli
from moe_train.config.compose import compose, typed
from moe_train.config.root import Config
from moe_train.config.schema import keys
from moe_train.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, CheckpointError
from moe_train.planner.report.plan_report import VERSION
from moe_train.run import main as runtime


def test_help_lists_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in text
        assert f"moe-train {command.example}" in text


@pytest.mark.parametrize("command", ["train", "config", "plan", "schedule"])
def test_command_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([command, "--help"])
    except SystemExit as done:
        code = int(done.code or 0)
    assert code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("1", 0)])
def test_train_py_has_the_same_help_once(
    rank: str, printed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert runtime.main(["train.steps=3", "--help"]) == 0
    assert capsys.readouterr().out.count("usage: moe-train train") == printed


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["trian"], "train"), (["data", "eat"], "data inspect")],
)
def test_unknown_commands(argv: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == EXIT_CONFIG
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["data", "--help"], 0), (["checkpoint", "-h"], 0), (["data"], EXIT_CONFIG)],
)
def test_a_group_shows_its_commands_alone(
    argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == code
    output = capsys.readouterr()
    inside = {name for name in cli.COMMANDS if name.startswith(argv[0] + " ")}
    assert all(f"moe-train {cli.COMMANDS[name].example}" in output.out for name in inside)
    assert "experiment=" not in output.out
    assert not output.err


def test_no_command_lists_the_groups_one_line_a_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == EXIT_CONFIG
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage") and all(f"{title}:" in lines for title in cli.GROUPS)
    for name, command in cli.COMMANDS.items():
        assert sum(line.split() == [*name.split(), *command.summary.split()] for line in lines) == 1


def test_every_command_has_its_function() -> None:
    for command in cli.COMMANDS.values():
        assert importlib.util.find_spec(command.module), command.module


def test_errors_of_the_family_become_message_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def verify(argv: list[str]) -> int:
        seen.append(argv)
        raise CheckpointError("step_00000020", "a file is truncated", "use step_00000010")

    stub = types.SimpleNamespace(verify_main=verify)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: stub)
    assert cli.main(["checkpoint", "verify", "--json", "x"]) == EXIT_CHECKPOINT
    assert seen == [["--json", "x"]]
    assert "use step_00000010" in capsys.readouterr().err


MISSION = ["experiment=moe_30b_8x64gb", "parallel.placement=stage"]


def test_plan_writes_the_whole_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    assert cli.main(["plan", *MISSION, "--json", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "30.06 B" in shown
    plan = json.loads(target.read_text())
    assert plan["version"] == VERSION
    assert plan["layout"]["tag"] == "TP2.PP4.EP2"
    assert plan["parameters"]["total"] == 30_063_481_344
    assert plan["ranks"][0]["parameters"]["total"] == 3_816_493_056
    assert [stage["chunks"] for stage in plan["stages"]][3] == [[13, 14, 15, 16]]
    assert plan["groups"]["pp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan["batch"]["tokens_per_step"] == 131072


@pytest.mark.parametrize(
    ("argv", "world"),
    [
        (["plan", "device=cpu"], 8),
        (["plan", "experiment=moe_30b_32x64gb"], 32),
        (["plan", "experiment=single"], 1),
        (["plan", "device=cpu", "--world", "2"], 2),
        (["plan", "--world", "4", "device=cpu"], 4),
    ],
)
def test_plan_knows_its_world(argv: list[str], world: int, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    assert cli.main([*argv, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["layout"]["world"] == world


def test_a_refused_plan_names_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "parallel=tp2_pp4_ep8", "optim.lr=-1", "--world", "8"]
    assert cli.main(argv) == EXIT_CONFIG
    output = capsys.readouterr().err
    assert "2 config errors" in output
    assert "parallel.tensor=2 parallel.pipeline=4 parallel.expert=2" in output


def test_config_shows_what_overrides_compose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["experiment=single", "train.steps=7"]
    assert cli.main(["config", *overrides]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert typed(shown) == compose(overrides)
    assert cli.main(["config", *overrides, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == shown
    assert cli.main(["config", *overrides, "--json", str(tmp_path / "config.json")]) == 0
    assert json.loads((tmp_path / "config.json").read_text()) == shown
    assert cli.main(["config", "train.steps=0"]) == EXIT_CONFIG
    assert "train.steps: expected integer >= 1, got 0" in capsys.readouterr().err


def test_config_lists_every_key_with_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--keys", "--json", "-"]) == 0
    listed = {each["key"]: each for each in json.loads(capsys.readouterr().out)}
    assert set(listed) == {key.name for key in keys(Config) if not key.is_group}
    assert all(each["type"] and each["doc"] for each in listed.values())
    assert cli.main(["config", "--keys", "model.router.score", "batch"]) == 0
    shown = capsys.readouterr().out
    assert 'model.router.score: one of softmax, sigmoid; default "softmax"\n' in shown
    assert "batch.global: integer >= 1 and <= 1048576 or null; default null\n" in shown
    assert "train.steps" not in shown
    assert cli.main(["config", "--keys", "modle"]) == EXIT_CONFIG
    assert "model" in capsys.readouterr().err


def test_unwritable_json_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "experiment=single", "--json", str(tmp_path / "no" / "plan.json")]
    assert cli.main(argv) == EXIT_CONFIG
    assert "--json" in capsys.readouterr().err


def test_plan_imports_no_torch() -> None:
    code = (
        "import sys; from moe_train.cli import main; code = main(['plan', 'experiment=single']);"
        "heavy = [m for m in ('torch', 'megatron.core', 'numpy') if m in sys.modules];"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_bad_sources_are_refused_without_waiting_for_megatron(tmp_path: Path) -> None:
    code = (
        "import sys; from moe_train.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(100 if 'megatron.core' in sys.modules else code)"
    )
    overrides = ["data", "prepare", str(tmp_path / "missing"), "--output", str(tmp_path / "set")]
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (EXIT_DATA, []), done.stderr

"""Meaningless numbers and unknown names are refused by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_train import cli
from moe_train.commands.calibrate import calibrate_main
from moe_train.config.compose import config_dir
from moe_train.errors import EXIT_CONFIG, ConfigError


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command writes to stderr as it refuses ``arguments``."""
    assert cli.main(list(arguments)) == EXIT_CONFIG, arguments
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "override, field",
    [
        ("hardware.message_us=-100000", "hardware.message_us"),
        ("hardware.latency_us=.inf", "hardware.latency_us"),
        ("hardware.collective_work=5", "hardware.collective_work"),
        ("hardware.gemm_efficiency=75", "hardware.gemm_efficiency"),
        ("hardware.cores=-3", "hardware.cores"),
        ("hardware.memory_gbps=0", "hardware.memory_gbps"),
        ("hardware.peak_tflops={fp32: -1}", "hardware.peak_tflops.fp32"),
        ("model.shared_expert_hidden=-1", "model.shared_expert_hidden"),
        ("model.layers=4096", "model.layers"),
        ("model.layers=1e308", "model.layers"),
        ("batch.microbatches=9223372036854775807", "batch.microbatches"),
        ("dtype=float32", "dtype"),
        ("experiment=moe_30b_8x65gb", "experiment"),
        ("model=null", "model"),
        ("hardware=null", "hardware"),
        ("~hardware", "hardware.peak_tflops"),
    ],
)
def test_illegal_value_is_refused(
    override: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = refusal(capsys, "plan", "--world", "8", override)
    assert f"- {field}: " in output or f"moe-train: {field}: " in output
    assert "Traceback" not in output


def test_a_misspelt_experiment_is_not_replaced_by_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "moe_30b_8x64gb" in refusal(capsys, "train", "experiment=moe_30b_8x65gb")


@pytest.mark.parametrize("text", [b"x: [\n", b"a: *b\n", b"\xff\xfe\x00"])
def test_a_broken_profile_is_refused(
    text: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A copy: other tests read the real folder at the same time.
    folder = tmp_path / "configs"
    shutil.copytree(config_dir(), folder)
    monkeypatch.setattr("moe_train.config.compose.config_dir", lambda: folder)
    (folder / "hardware" / "broken.yaml").write_bytes(text)
    assert "has no option" not in refusal(capsys, "plan", "hardware=broken")


@pytest.mark.parametrize("overrides", [["--imbalance", "inf"], ["--imbalance", "nan"]])
@pytest.mark.parametrize("command", ["plan", "schedule"])
def test_infinite_imbalance(
    command: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--imbalance" in refusal(capsys, command, *overrides)


@pytest.mark.parametrize("overrides", [["--world", "-8"], ["--world", "0"]])
def test_claims_need_a_world(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--world" in refusal(capsys, "plan", "--claims", "source_document", *overrides)


def test_claims_as_json_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "claims.json"
    assert cli.main(["plan", "--claims", "source_document", "--json", str(target)]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(target.read_text(), parse_constant=refuse)["claims"]


@pytest.mark.parametrize("name", ["cpu", "a100_64gb", "null"])
def test_calibration_spares_the_shipped_profiles(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        calibrate_main(["--calibrate", name])

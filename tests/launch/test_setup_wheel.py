"""The wheel works without the checkout: configuration files and console script included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked into an empty folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("moe_train", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    wheels = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", wheels, source],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = wheels.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_every_configuration_file_is_in_the_wheel(installed: Path) -> None:
    def listed(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}

    assert listed(ROOT / "configs")
    assert listed(installed / "moe_train" / "configs") == listed(ROOT / "configs")


def test_the_console_script_is_declared(installed: Path) -> None:
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    assert "moe-train = moe_train.cli:main" in entries.read_text()


def test_the_wheel_composes_a_configuration_far_from_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    script = (
        "import moe_train\n"
        "from moe_train.config.compose import compose\n"
        "config = compose(['experiment=twin'])\n"
        "print(moe_train.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)

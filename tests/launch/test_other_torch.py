"""launch/test_torch.sh: when its environment is installed, and which tests it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.launch.test_setup_launchers import ROOT, script

PYTHON = """echo "$*" >>calls
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
"""


def run(home: Path) -> list[str]:
    """What the script called Python with."""
    (home / "calls").unlink(missing_ok=True)
    command = [home / "launch" / "test_torch.sh", "2.11", "-x"]
    subprocess.run(command, check=True, capture_output=True)
    return (home / "calls").read_text().splitlines()


def newer(path: Path, stamp: Path) -> None:
    after = stamp.stat().st_mtime + 10
    os.utime(path, (after, after))


def test_environment_follows_the_pinned_versions(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test_torch.sh", tmp_path / "launch")
    python = script(tmp_path / "python", PYTHON)
    script(tmp_path / "launch" / "find_python.sh", f'echo "{python}"')
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("torch==2.15\nnumpy==2\n")
    kernels = tmp_path / "tests" / "backend" / "test_kernels_adam.py"
    kernels.parent.mkdir(parents=True)
    kernels.touch()

    home = tmp_path / ".venv-torch-2.11"
    made = run(tmp_path)
    assert any(f"-m venv --clear {home.name}" in call for call in made)
    assert (home / "constraints.txt").read_text() == "numpy==2\n"
    assert made[-1].startswith("-m pytest -q tests/backend/test_kernels_adam.py ")
    assert made[-1].endswith(" -x")
    assert run(tmp_path) == made[-1:], "nothing is installed twice"
    for name in ("pyproject.toml", "constraints.txt"):
        newer(tmp_path / name, home / ".installed")
        assert run(tmp_path) == made, name
        newer(home / ".installed", tmp_path / name)

    kernels.unlink()
    failed = subprocess.run([tmp_path / "launch" / "test_torch.sh", "2.11"], capture_output=True)
    assert failed.returncode != 0
    assert b"no match" in failed.stderr

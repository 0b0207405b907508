"""Two pinned sets, for CUDA 12 and 13, and which of them a machine gets."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SETS = {"13": ROOT / "constraints.txt", "12": ROOT / "constraints-cu12.txt"}
OF_CUDA = re.compile(r"^(nvidia-|cuda-|torch$|triton$|transformer-engine-cu1)")


def pins(cuda: str) -> dict[str, str]:
    lines = SETS[cuda].read_text().splitlines()
    result = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in result.items()}


@pytest.mark.parametrize("cuda", SETS)
def test_a_set_has_all_that_pyproject_asks_for_within_its_bounds(cuda: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    gpu = extras["gpu" if cuda == "13" else "gpu-cu12"]
    own = canonicalize_name(project["name"])
    result = pins(cuda)
    for text in [*project["dependencies"], *extras["dev"], *extras["hf"], *gpu]:
        need = Requirement(text)
        if canonicalize_name(need.name) != own:
            assert need.specifier.contains(result[canonicalize_name(need.name)]), text
    assert [need for need in map(Requirement, gpu) if f"core_cu{cuda}" in need.extras]


def test_the_sets_differ_in_what_cuda_is_about_only() -> None:
    ours, older = pins("13"), pins("12")
    assert {n: v for n, v in ours.items() if not OF_CUDA.match(n)} == {
        n: v for n, v in older.items() if not OF_CUDA.match(n)
    }
    assert ours["transformer-engine-cu13"] == older["transformer-engine-cu12"]
    assert not [name for name in older if "cu13" in name]
    libraries = [name for name in older if name.startswith("nvidia-")]
    assert libraries and all(name.endswith("-cu12") for name in libraries)


def test_the_installed_torch_asks_for_the_pins_of_its_set() -> None:
    """torch's wheel names its libraries' exact versions; which set it is of, it says as well."""
    import torch

    if not torch.version.cuda:
        pytest.skip("torch is built without CUDA")
    result = pins(torch.version.cuda.split(".")[0])
    if result["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip("another torch than the pinned one")
    checked = 0
    for text in importlib.metadata.requires("torch") or []:
        need = Requirement(text)
        if OF_CUDA.match(need.name) and need.specifier:
            assert need.specifier.contains(result[canonicalize_name(need.name)]), text
            checked += 1
    assert checked >= 3


def choose(
    folder: Path, driver: str | None, code: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    if driver is not None:
        answer = folder / "nvidia-smi"
        answer.write_text(f'#!/bin/bash\nprintf "%s" "{driver}"\nexit {code}\n')
        answer.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key != "CUDA"}
    return subprocess.run(
        [str(ROOT / "launch" / "choose_cuda.sh")],
        env={**clean, "PATH": f"{folder}:{bare_path(folder)}", **env},
        capture_output=True,
        text=True,
    )


def bare_path(folder: Path) -> str:
    """A PATH with a shell, without any driver's tools."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "env"):
        place = shutil.which(name)
        assert place
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(place)
    return str(tools)


@pytest.mark.parametrize(
    ("driver", "code", "cuda", "why"),
    [
        ("580.65.06", 0, "13", "driver 580.65.06 supports it"),
        ("610.10\n610.10\n", 0, "13", "driver 610.10 supports it"),
        ("575.57.08", 0, "12", "older than 580"),
        ("525.60.13", 0, "12", "older than 580"),
        ("470.82.01", 0, "12", "older than 525"),
        ("NVIDIA-SMI has failed because it could not talk to the driver", 9, "13", "no NVIDIA"),
        (None, 0, "13", "no NVIDIA driver"),
    ],
)
def test_the_driver_decides(
    tmp_path: Path, driver: str | None, code: int, cuda: str, why: str
) -> None:
    done = choose(tmp_path, driver, code)
    assert (done.returncode, done.stdout) == (0, f"{cuda}\n"), done.stderr
    assert why in done.stderr


def test_who_sets_cuda_decides(tmp_path: Path) -> None:
    assert choose(tmp_path, "580.65", CUDA="12").stdout == "12\n"
    assert choose(tmp_path, "535.1", CUDA="13").stdout == "13\n"
    assert choose(tmp_path, "535.1", CUDA="/usr/local/cuda").stdout == "12\n", "of other tools"
    refused = choose(tmp_path, "535.1", CUDA="11")
    assert refused.returncode == 2 and "12 or 13" in refused.stderr and not refused.stdout


@pytest.mark.parametrize(
    ("cuda", "name", "curand"),
    [
        ("12", "constraints-cu12.txt", "nvidia-curand-cu12"),
        ("13", "constraints.txt", "nvidia-curand"),
    ],
)
def test_setup_installs_the_chosen_set(tmp_path: Path, cuda: str, name: str, curand: str) -> None:
    """In a checkout of its own, whose pip writes down what it is asked for."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\nprintf "%s " "$@" >>"{tmp_path}/asked"; echo >>"{tmp_path}/asked"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        [str(tmp_path / "launch" / "setup.sh")],
        env={**os.environ, "CUDA": cuda, "EXTRAS": "dev,gpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"versions of {name}" in done.stdout and f"CUDA={cuda}" in done.stderr
    args = (tmp_path / "asked").read_text().splitlines()
    installs = [line for line in args if "install" in line]
    assert len(installs) == 3 and all(f"--constraint {name} " in line for line in installs)
    assert f"transformer-engine[core_cu{cuda},pytorch] {curand} " in installs[2]
    assert (tmp_path / ".venv" / ".cuda").read_text() == f"{cuda}\n"


def test_another_cuda_than_the_installed_is_set_up_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py", *(path.name for path in SETS.values())):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text("#!/bin/bash\necho again\n")
    venv = tmp_path / ".venv"
    venv.mkdir()
    (venv / ".cuda").write_text("13\n")
    (venv / ".installed").touch()

    def make(**env: str) -> str:
        clean = {
            key: value for key, value in os.environ.items() if key not in ("CUDA", "MAKEFLAGS")
        }
        return subprocess.run(
            # Started by make, as `make test` starts this, make would name its folders.
            ["make", "--no-print-directory", "setup"],
            cwd=tmp_path,
            env={**clean, **env},
            capture_output=True,
            text=True,
        ).stdout

    assert make() == "" and make(CUDA="13") == "" and make(CUDA="/usr/local/cuda") == ""
    assert make(CUDA="12") == "again\n"

"""The shell side: which Python is found, and what a launcher hands to torchrun."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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

"""Checkpoints of a CPU, of torch's and of TransformerEngine's kernels are one.

The same keys, shapes and offsets, at full size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_train.testing.world import run_world
from tests.model.test_fullsize_configs import EXPERIMENTS, cuda_process
from tests.model.test_fullsize_model import READINGS, TOTAL, overrides
from tests.support.shards import Matrix, whole_model

ROOT = Path(__file__).resolve().parents[2]
# Cold, the build takes an hour of one core; afterwards it is a look at a file.
BUILD_SECONDS = 3 * 3600


@pytest.fixture(scope="session")
def interpreter() -> str:
    """A Python that imports TransformerEngine, built from source where it is not yet."""
    built = subprocess.run(
        [ROOT / "launch/build_te.sh"], capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    if built.returncode == 3:
        pytest.skip(f"TransformerEngine cannot be built here: {built.stderr.strip()[-600:]}")
    assert built.returncode == 0, built.stderr
    return built.stdout.strip()


def ask(interpreter: str, module: str, args: Sequence[str], world: int) -> Any:
    done = subprocess.run(
        [interpreter, "-W", "ignore", "-m", f"tests.support.{module}", str(world), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def matrix(row: Sequence[Any]) -> Matrix:
    key, shape, place, corner, size, dtype = row
    return Matrix(key, tuple(shape), tuple(place), tuple(corner), tuple(size), dtype)


def host_ranks(rank: int, one: int, args: list[str], world: int) -> list[set[Matrix]]:
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.measure.dryrun.world import fake_world
    from moe_train.planner.resolution import resolve_run
    from tests.support.chunks import fake_chunks
    from tests.support.shards import matrices

    run = resolve_run(args, world)
    ranks = []
    for each in range(world):
        with fake_world(each, world):
            ranks.append(matrices(fake_chunks(run, CpuBackend(run.config.backend))))
    return ranks


def assert_same_checkpoint(
    interpreter: str, kernels: str, args: list[str], world: int
) -> list[set[Matrix]]:
    """Every rank of the CUDA backend writes what the host's writes; returns the former."""
    output = ask(interpreter, "cuda_model", [*args, f"backend.kernels={kernels}"], world)
    [host] = run_world(host_ranks, 1, args, world)
    assert len(output) == len(host) == world
    cuda = []
    for rank, here in enumerate(host):
        rows = [matrix(row) for row in output[rank]["matrices"]]
        doubled = [row for row, times in Counter(rows).items() if times > 1]
        assert not doubled, f"rank {rank} writes twice: {doubled[:3]}"
        there = set(rows)
        assert {m.key for m in there} == {m.key for m in here}, f"keys of rank {rank}"
        assert there == here, (
            f"rank {rank}: only on CUDA {sorted(there - here)[:3]}, "
            f"only on the host {sorted(here - there)[:3]}"
        )
        assert output[rank]["parameters"] == sum(m.cells for m in there)
        cuda.append(there)
    return cuda


@pytest.mark.full
@pytest.mark.te
@pytest.mark.timeout(BUILD_SECONDS + 1200)
@pytest.mark.parametrize("reading", READINGS)
def test_transformer_engine_writes_the_same_checkpoint(interpreter: str, reading: str) -> None:
    arguments, world = overrides(reading)
    assert whole_model(assert_same_checkpoint(interpreter, "te", arguments, world)) == TOTAL


@pytest.mark.full
@pytest.mark.parametrize("reading", READINGS)
def test_torch_kernels_write_the_same_checkpoint(reading: str) -> None:
    arguments, world = overrides(reading)
    assert whole_model(assert_same_checkpoint(sys.executable, "torch", arguments, world)) == TOTAL


def test_torch_kernels_of_a_small_model_write_the_same_checkpoint() -> None:
    arguments = ["experiment=single", "model.experts=4", "parallel.tensor=2", "parallel.expert=2"]
    arguments += ["model.vocab=256", "model.layers=2", "model.shared_expert_hidden=32"]
    whole_model(assert_same_checkpoint(sys.executable, "torch", arguments, 2))


@pytest.mark.full
@pytest.mark.te
@pytest.mark.timeout(BUILD_SECONDS + 1200)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_real_engine_answers_as_the_default_suite_assumes(
    interpreter: str, experiment: str
) -> None:
    """Configs are checked without TransformerEngine elsewhere; here it is asked itself."""
    arguments, world, _ = EXPERIMENTS[experiment]
    real = ask(interpreter, "cuda_configs", arguments, world)
    assert real == cuda_process(experiment)

"""Host and CUDA checkpoints are one: the same keys, shapes and offsets at full size."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_fullsize_configs import EXPERIMENTS, cuda_process
from test_fullsize_model import READINGS, TOTAL, overrides

from moe_train.testing.shards import Matrix, whole_model
from moe_train.testing.world import run_world

ROOT = Path(__file__).resolve().parent.parent
# Cold, the build takes an hour of one core; afterwards it is a look at a file.
BUILD_SECONDS = 3 * 3600

pytestmark = [pytest.mark.full, pytest.mark.te]


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


def ask(interpreter: str, module: str, words: Sequence[str], world: int) -> Any:
    done = subprocess.run(
        [interpreter, "-W", "ignore", "-m", f"moe_train.testing.{module}", str(world), *words],
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


def host_ranks(rank: int, one: int, words: list[str], world: int) -> list[set[Matrix]]:
    from moe_train.backend.host.backend import HostBackend
    from moe_train.dryrun.world import fake_chunks, fake_world
    from moe_train.plan.prepare import prepare
    from moe_train.testing.shards import matrices

    config, layout = prepare(words, world)
    ranks = []
    for each in range(world):
        with fake_world(each, world):
            ranks.append(matrices(fake_chunks(config, layout, HostBackend(config.backend))))
    return ranks


@pytest.mark.timeout(BUILD_SECONDS + 1200)
@pytest.mark.parametrize("reading", READINGS)
def test_both_providers_write_the_same_checkpoint(interpreter: str, reading: str) -> None:
    words, world = overrides(reading)
    told = ask(interpreter, "cuda_model", words, world)
    [host] = run_world(host_ranks, 1, words, world)
    assert len(told) == len(host) == world
    cuda = []
    for rank, here in enumerate(host):
        rows = [matrix(row) for row in told[rank]["matrices"]]
        doubled = [row for row, times in Counter(rows).items() if times > 1]
        assert not doubled, f"rank {rank} writes twice: {doubled[:3]}"
        there = set(rows)
        assert {m.key for m in there} == {m.key for m in here}, f"keys of rank {rank}"
        assert there == here, (
            f"rank {rank}: only on CUDA {sorted(there - here)[:3]}, "
            f"only on the host {sorted(here - there)[:3]}"
        )
        assert told[rank]["parameters"] == sum(m.cells for m in there)
        cuda.append(there)
    assert whole_model(cuda) == TOTAL


@pytest.mark.timeout(BUILD_SECONDS + 1200)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_real_engine_answers_as_the_default_suite_assumes(
    interpreter: str, experiment: str
) -> None:
    """Configs are checked without TransformerEngine elsewhere; here it is asked itself."""
    words, world, _ = EXPERIMENTS[experiment]
    real = ask(interpreter, "cuda_configs", words, world)
    assert real == cuda_process(experiment)

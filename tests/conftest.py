"""Settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.testing.layouts import SMALL, Runs

# Programs that tests start import tests.support too.
ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# Ranks and BLAS must not fight for cores; also what the bitwise comparisons assume.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach for the network: a mirror or tokenizer that wants to is told so at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of the small model, each made once for all tests."""
    return Runs(tmp_path_factory.mktemp("small"), SMALL)


# Started first, so that no process ends alone with one of them.
LONGEST = ("rehearsal/test_rehearsal", "measure/test_dryrun", "model/test_router", "run/test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take; tests of a file stay together."""

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=place)

"""An oracle that is not ours: the same weights in Transformers, of every architecture."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.testing.world import run_world
from tests.convert.models import CASES, network, our_logits, their_logits

pytest.importorskip("transformers")


@cache
def oracle(name: str, shape: str) -> Any:
    return network(name, shape)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Saved by Transformers itself."""
    root = tmp_path_factory.mktemp("saved")
    for name, shape in CASES:
        oracle(name, shape).save_pretrained(root / f"{name}-{shape}")
    return {(name, shape): root / f"{name}-{shape}" for name, shape in CASES}


@pytest.fixture(scope="module")
def ours(folders: dict[tuple[str, str], Path]) -> dict[str, Any]:
    [answers] = run_world(our_logits, 1, [str(path) for path in folders.values()])
    return dict(answers)


@pytest.mark.world
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_logits_are_transformers(
    name: str, shape: str, folders: dict[tuple[str, str], Path], ours: dict[str, Any]
) -> None:
    theirs = their_logits(oracle(name, shape))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours[str(folders[name, shape])], theirs, rtol=1e-4, atol=1e-4)

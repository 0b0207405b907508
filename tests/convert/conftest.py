"""Folders that Transformers saved, and what the models here say about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_train.testing.world import run_world
from tests.convert.models import CASES, Answer, answers, network

type Case = tuple[str, str]
type Saved = Callable[[str, str, bool], Path]


@pytest.fixture(scope="session")
def networks() -> Callable[[str, str], Any]:
    """Transformers' model of a case."""
    pytest.importorskip("transformers")
    return cache(network)


@pytest.fixture(scope="session")
def saved(networks: Callable[[str, str], Any], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folder that save_pretrained wrote of a case: one tensor an expert, or stacked."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def save(name: str, shape: str, stacked: bool = False) -> Path:
        path = root / f"{name}-{shape}-{stacked}"
        networks(name, shape).save_pretrained(path, save_original_format=not stacked)
        return path

    return save


@pytest.fixture(scope="session")
def ours(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Answer]:
    """Of every case, in one world of one rank."""
    folders = {case: str(saved(*case, False)) for case in CASES}
    root = tmp_path_factory.mktemp("checkpoints")
    [results] = run_world(answers, 1, list(folders.values()), str(root))
    return {case: results[folder] for case, folder in folders.items()}

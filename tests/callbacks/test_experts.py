"""What every expert had in every step, as the run folder tells it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_train.run_folder.metrics import read
from moe_train.testing.layouts import TP2_PP2_EP2
from moe_train.testing.runs import train_run
from tests.support.survival import FAULTY

pytestmark = pytest.mark.world
LAYERS, EXPERTS, TOP, TOKENS = 2, 8, 2, 4 * 16
WORDS = [*FAULTY, "train.steps=4", "checkpoint.every=2"]


def test_every_token_is_counted_once_in_every_layout(tmp_path: Path) -> None:
    single = train_run(tmp_path / "single", WORDS, 1)
    layout = train_run(tmp_path / "layout", [*WORDS, *TP2_PP2_EP2.overrides], 4)
    assert single.codes == [0] and layout.codes == [0] * 4
    output = [read(run.folder / "experts" / "tokens.jsonl") for run in (single, layout)]
    assert [line["step"] for line in output[0]] == [1, 2, 3, 4]
    for line, record in zip(output[0], single.steps, strict=True):
        counts = np.array(line["tokens"])
        assert counts.shape == (LAYERS, EXPERTS)
        assert (counts.sum(axis=1) == TOKENS * TOP).all()
        imbalance = (counts.max(axis=1) / counts.mean(axis=1)).mean()
        assert record["load_imbalance"] == pytest.approx(imbalance)
    assert output[0][0] == output[1][0], "the first step routes alike in every layout"


def test_steps_trained_again_are_told_once(tmp_path: Path) -> None:
    overrides = [*WORDS, "optim.warmup_steps=1", "optim.decay_steps=6"]
    folder = tmp_path / "run"
    assert train_run(folder, overrides, 1).codes == [0]
    again = [*overrides, "train.steps=6", f"checkpoint.resume={folder}/checkpoints/step_00000002"]
    assert train_run(folder, again, 1).codes == [0]
    assert [line["step"] for line in read(folder / "experts" / "tokens.jsonl")] == list(range(1, 7))

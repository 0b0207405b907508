"""An oracle that is not ours: the same weights in Transformers, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.config.root import Config
from moe_train.convert.card import Facts
from moe_train.convert.exporting import export_checkpoint
from moe_train.convert.folder import open_folder
from moe_train.convert.tokenizers import Tokens
from tests.convert.models import CASES, Answer, their_logits


@pytest.mark.world
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_in(name: str, shape: str, networks: Any, ours: dict[tuple[str, str], Answer]) -> None:
    theirs = their_logits(networks(name, shape))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours[name, shape].imported, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.world
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_out(
    name: str, shape: str, saved: Any, ours: dict[tuple[str, str], Answer], tmp_path: Path
) -> None:
    """A model that was initialised here, exported and loaded by Transformers."""
    import transformers

    answer = ours[name, shape]
    config = Config(model=open_folder(saved(name, shape, False)).model)
    done = export_checkpoint(
        Path(answer.checkpoint),
        tmp_path / "out",
        config,
        tokens=Tokens(positions=64),
        facts=Facts(),
    )
    assert done.architecture.name == name
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        done.folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = their_logits(loaded.eval())
    assert np.abs(theirs - ours[name, shape].imported).max() > 1
    np.testing.assert_allclose(answer.random, theirs, rtol=1e-4, atol=1e-4)

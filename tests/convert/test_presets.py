"""Presets of public models: as many parameters as Transformers' own model of that config."""

from __future__ import annotations

import pytest
import torch

from moe_train.config.compose import compose
from moe_train.convert.architecture import hf_config
from moe_train.convert.registry import choose
from moe_train.parallel.parameters import model_parameters, padded_vocab

transformers = pytest.importorskip("transformers")
PRESETS = {
    # Published: 46.7 B and 12.9 B, 141 B and 39 B, 30.5 B and 3.3 B, 6.9 B and 1.3 B.
    "mixtral_8x7b": ("mixtral", 46.7, 12.9),
    "mixtral_8x22b": ("mixtral", 140.6, 39.1),
    "qwen3_30b_a3b": ("qwen3_moe", 30.5, 3.3),
    "olmoe_1b_7b": ("olmoe", 6.9, 1.3),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    expected, total, active = PRESETS[name]
    config = compose([f"model={name}", "recompute=none"])
    model = config.model
    assert model.vocab is not None
    assert padded_vocab(model.vocab, model.vocab_multiple) == model.vocab
    architecture, _ = choose(model, {})
    assert architecture.name == expected
    fields = hf_config(architecture, model, model.vocab, "bfloat16", 4096)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**fields)
        )
    counts = model_parameters(model, model.vocab)
    assert counts.total == sum(parameter.numel() for parameter in theirs.parameters())
    assert counts.total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.06)
    shapes = architecture.expected(model, model.vocab, stacked=True)
    assert {k: tuple(v.shape) for k, v in theirs.state_dict().items()} == shapes

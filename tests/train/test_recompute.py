"""Recomputing layers 2-15 of the twin saves what it is for: activation memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_train.testing.layouts import TWIN
from moe_train.testing.world import run_world
from tests.support.activations import SavedBytes, peak_saved_bytes
from tests.support.document import document

DOCS = Path(__file__).parents[2] / "docs" / "parity.md"
CONDITIONS = (
    "The twin in one process, one micro-batch of 128 tokens, fp32. Peak bytes of distinct "
    "storages that autograd saved, weights, gradients and inputs left out, tensors saved anew "
    "during recomputation included."
)


def test_counter_sees_what_lives() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.watch():
        x = torch.randn(32, 64)
        loss = (x @ weight).exp().sum()
        # x for the product, the exponential for its own derivative; the weight is not counted.
        assert saved.live == saved.peak == 2 * 32 * 64 * 4
        loss.backward()
        del loss
    assert saved.live == 0 and saved.peak == 2 * 32 * 64 * 4


@pytest.mark.world
def test_recompute_2_15_saves_at_least_forty_percent_on_the_twin() -> None:
    # The two layers that keep theirs, and one that is being recomputed, always remain.
    sizes = {}
    losses = set()
    for choice in ("none", "2-15", "all"):
        overrides = [*TWIN, f"recompute.layers={choice}", "batch.global=1"]
        peak, left, loss = run_world(peak_saved_bytes, 1, overrides)[0]
        assert left == 0, f"{left} bytes outlive the step"
        sizes[choice] = peak
        losses.add(loss)
    document(DOCS, "Recompute", CONDITIONS, "recompute", ["peak bytes", "against none"])
    for choice, peak in sizes.items():
        cells = [f"{peak:,}", f"{peak / sizes['none'] - 1:+.0%}"]
        document(DOCS, "Recompute", CONDITIONS, choice, cells)
    assert len(losses) == 1, losses
    assert sizes["2-15"] <= 0.6 * sizes["none"], sizes
    assert sizes["all"] < sizes["2-15"], sizes

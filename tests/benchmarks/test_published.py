"""The published runs: what the data must say, and the conversion of figures to seconds."""

from __future__ import annotations

import pytest

from benchmarks.published.predict import published_seconds
from benchmarks.published.rows import Entry, entries, entry, models, scored


def test_enough_runs_of_enough_models_are_scored():
    assert len(scored()) >= 20
    assert len({one.run.model for one in scored()}) >= 6


@pytest.mark.parametrize("one", entries(), ids=lambda one: one.run.id)
def test_a_row_says_where_it_stands(one: Entry):
    assert one.run.place and one.source.document
    if one.run.unit == "mfu":
        assert one.run.peak_tflops
    if one.run.dtype == "fp8":
        assert one.run.fp8_recipe


def test_every_model_has_a_run():
    assert {one.run.model for one in entries()} == set(models())


def test_figures_become_seconds_under_the_source_s_count():
    # Grok-1's README: 1024 sequences x 4.27e15 operations in 15.933 s are 54.2 % of 989 TFLOP/s.
    grok = entry("grok-512")
    assert published_seconds(grok) == 15.933
    drop = entry("folding-8x22b-128-256")
    # Table 2 states the same run as 487.7 TFLOP/s, Table 3 as 49.3 % of 989.5.
    assert drop.run.figure * 989.5 == pytest.approx(487.7, rel=1e-3)
    zoo = entry("zoo-8x22b")
    # 256 sequences of 4096 tokens at 465 TFLOP/s of each of 128 GPUs; 39.2 B active parameters
    # are 6 operations a token each, and half the attention matrix 6 x 4096 x 6144 a layer.
    active, attention = 39.1e9 - 2 * 0.2e9 + 0.2e9, 6 * 4096 * 6144 * 56
    seconds = 256 * 4096 * (6 * active + attention) / (465e12 * 128)
    assert published_seconds(zoo) == pytest.approx(seconds, rel=0.01)

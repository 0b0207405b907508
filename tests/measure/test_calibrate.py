"""Calibration without its measurements: several profiles into one."""

from __future__ import annotations

import pytest

from moe_train.commands.calibrate import FITTED, calibrate_main, doubtful, medians
from moe_train.errors import ConfigError


def test_medians_of_numbers_and_the_rest_as_it_is() -> None:
    rates = [(100.0, 0.1), (300.0, 0.3), (120.0, 0.2)]
    profiles = [
        {"name": "here", "cores": 2, "latency_us": latency, "peak_tflops": {"fp32": peak},
         "sources": {"cores": "by affinity"}}
        for latency, peak in rates
    ]  # fmt: skip
    assert medians(profiles) == {
        "name": "here", "cores": 2, "latency_us": 120.0, "peak_tflops": {"fp32": 0.2},
        "sources": {"cores": "by affinity"},
    }  # fmt: skip
    assert medians(profiles[:1]) == profiles[0]


def test_costs_that_a_fit_lost_are_named() -> None:
    whole = dict.fromkeys(FITTED, 3.0)
    assert doubtful(whole) == []
    assert doubtful({**whole, "message_us": 0.0, "latency_us": 0.0}) == ["latency_us", "message_us"]


@pytest.mark.parametrize("overrides", [["--calibrate", "--rounds", "0"], ["--calibrate", "a b"]])
def test_bad_words_are_refused_before_anything_is_measured(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        calibrate_main(overrides)

"""The numbers of a claims report's first page, computed again from the plan.json inside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

GB = 1e9
Report = dict[str, Any]


def _worst(report: Report) -> dict[str, Any]:
    stages: list[dict[str, Any]] = report["memory"]["stages"]
    return max(stages, key=lambda one: float(one["total_bytes"]))


def _plain_adam(report: Report) -> float:
    rows = report["memory"]["optimizers"]
    return float(next(row["state_bytes"] for row in rows if row["optimizer"] == "plain Adam"))


def _state(report: Report) -> float:
    worst = _worst(report)
    return float(sum(worst[f"{name}_bytes"] for name in ("weight", "gradient", "optimizer")))


def _without_optimizer(report: Report) -> float:
    worst = _worst(report)
    return float(sum(worst[f"{name}_bytes"] for name in ("weight", "gradient", "activation")))


def _experts(report: Report) -> int:
    first, last = report["ranks"][0]["experts"]
    return int(last - first + 1)


def _gain(report: Report) -> float:
    return float(1 - report["better"]["step_seconds"] / report["time"]["step_seconds"]
                 if report["fits"] else 1.0)  # fmt: skip


FIGURES: dict[str, Callable[[Report], float]] = {
    "model.parameters_billion": lambda r: r["parameters"]["total"] / 1e9,
    "model.fp32_gb": lambda r: 4 * r["parameters"]["total"] / GB,
    "model.fp16_gb": lambda r: 2 * r["parameters"]["total"] / GB,
    "model.expert_modules": lambda r: len(r["deployment"]["modules"]),
    "hardware.total_gb": lambda r: r["layout"]["world"] * r["hardware"]["memory_gb"],
    "hardware.memory_gb": lambda r: r["hardware"]["memory_gb"],
    "hardware.ranks": lambda r: r["layout"]["world"],
    "hardware.devices_per_node": lambda r: r["hardware"]["devices_per_node"],
    "memory.total_gb": lambda r: _worst(r)["total_bytes"] / GB,
    "memory.fraction": lambda r: _worst(r)["total_bytes"] / r["memory"]["device_bytes"],
    "memory.state_gb": lambda r: _state(r) / GB,
    "memory.without_optimizer_gb": lambda r: _without_optimizer(r) / GB,
    "memory.plain_adam_gb": lambda r: _plain_adam(r) / GB,
    "experts.per_rank": _experts,
    "experts.modules_per_rank": lambda r: r["ranks"][0]["expert_modules"],
    "experts.share_per_rank": lambda r: (
        r["ranks"][0]["parameters"]["experts"] / r["parameters"]["experts"]
    ),
    "parallel.tensor": lambda r: r["layout"]["tensor"],
    "parallel.expert": lambda r: r["layout"]["expert"],
    "pipeline.stages": lambda r: r["layout"]["pipeline"],
    "pipeline.layers_per_stage": lambda r: sum(map(len, r["stages"][0]["chunks"])),
    "data.sequence": lambda r: r["batch"]["tokens_per_step"] / r["batch"]["sequences_per_step"],
    "time.sequences_per_second": lambda r: (
        r["batch"]["sequences_per_step"] / r["time"]["step_seconds"]
    ),
    "time.mfu": lambda r: (
        r["compute"]["flops_per_token"]["total"]
        * (r["batch"]["tokens_per_step"] / r["time"]["step_seconds"])
        / (r["layout"]["world"] * 1e12 * r["hardware"]["peak_tflops"]["bf16"])
    ),
    "time.layer_ms": lambda r: 1e3 * r["compute"]["layer_seconds"],
    "attention.heads_per_rank": lambda r: r["model_config"]["heads"] / r["layout"]["tensor"],
    "parameters.spread": lambda r: (
        1
        - min(one["parameters"]["total"] for one in r["ranks"])
        / max(one["parameters"]["total"] for one in r["ranks"])
    ),
    "layout.needed_ranks_in_stages": lambda r: math.lcm(
        *(
            math.prod(r["layout"][name] for name in ("pipeline", *names))
            for names in (("tensor", "context"), ("expert", "expert_tensor"))
        )
    ),
    "layout.gain": _gain,
    "published.bf16_mfu": lambda _: 0.522,  # tests/planner/test_claims.py holds it
}
"""Quantities, each by a formula of plan.json's own numbers."""

YES_OR_NO = re.compile(r"comes to (yes|no)\.$")


def recomputed(data: Report) -> None:
    """Check every figure of ``first_page``, and that its sentence has no other number.

    Args:
        data: the claims command's JSON.
    """
    texts = {claim["id"]: claim["text"] for claim in data["claims"]}
    for one in data["first_page"]:
        said = one["text"].removeprefix(texts[one["id"]])
        for name, value in one["figures"].items():
            if name in FIGURES:
                assert FIGURES[name](data["plan"]) == pytest.approx(value), (one["id"], name)
            else:
                assert YES_OR_NO.search(said), (one["id"], name)
        numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?= |$|\.$)", said)
        assert len(numbers) <= len(one["figures"]) + said.count("claim "), (one["id"], said)

"""The plan on one screen: short, narrow, whole words, numbers of the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.planner.report.costs import ASSUMED, SOURCES

PLANS = [
    ["experiment=moe_30b_8x64gb"],
    ["experiment=moe_30b_8x64gb", "parallel.overlap_expert_comm=true", "batch.global=4096"],
    ["experiment=moe_30b_8x64gb", "optim=adam", "hardware=a100_40gb"],  # does not fit
    ["experiment=moe_30b_32x64gb", "model.router.capacity_factor=1.25", "--imbalance", "1.3"],
    ["hardware=h100_80gb", "dtype=fp8"],
    ["device=cpu", "experiment=twin"],
    ["hardware=unknown_gpu", "experiment=single"],
    ["experiment=single", "megatron.transformer.apply_rope_fusion=false",
     "megatron.optimizer.overlap_cpu_optimizer_d2h_h2d=false"],
]  # fmt: skip


@pytest.mark.parametrize("words", PLANS, ids=lambda words: words[-1])
def test_a_plan_fits_a_screen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """At most 40 lines of 80 columns, and every word of the report's sentences in one piece."""
    code = main(["plan", *words, "--json", "-"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)  # nothing but JSON
    screen = captured.err.partition("moe-train: ")[0]
    lines = screen.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines), screen
    assert (code == 0) == report["fits"]
    written = screen.split()
    given = [word for word in words if word.startswith("megatron.")]
    for override in given:
        assert any(word.strip(",:") == override.partition("=")[0] for word in written), screen
    assert f"configs/hardware/{report['hardware']['name']}.yaml." in written
    assert report["layout"]["tag"] in written


def test_the_screens_figures_are_the_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=moe_30b_8x64gb", "--json", "-"]) == 0
    captured = capsys.readouterr()
    report, screen = json.loads(captured.out), " ".join(captured.err.split())
    time, step = report["time"], report["time"]["step_seconds"]
    worst = max(stage["total_bytes"] for stage in report["memory"]["stages"])
    term, seconds = max(time["terms"].items(), key=lambda one: one[1])
    for text in (
        f"{worst / 1e9:.1f} of {report['hardware']['memory_gb']:g} GB",
        f"{report['parameters']['total'] / 1e9:.2f} B",
        f"{report['batch']['tokens_per_step']:,} tokens",
        f"{step:.2f} s a step, {step * 0.85:.2f} s to {step * 1.15:.2f} s",
        f"MFU {100 * time['mfu']:.1f} %",
        f"bubble {100 * time['bubble']:.1f} %",
        f"bottleneck {term}: {seconds:.2f} s of a step",
    ):
        assert text in screen


def test_the_better_layout_is_one_when_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    """Its overrides, added to the plan's own, give the time and memory that are quoted."""
    words = ["experiment=moe_30b_8x64gb", "parallel.overlap_expert_comm=true"]
    assert main(["plan", *words, "--json", "-"]) == 0
    asked = json.loads(capsys.readouterr().out)
    better = asked["better"]
    assert main(["plan", *words, *better["overrides"], "--json", "-"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["layout"]["tag"] == better["layout"]
    assert other["fits"] and other["batch"]["tokens_per_step"] == asked["batch"]["tokens_per_step"]
    assert other["time"]["step_seconds"] == pytest.approx(better["step_seconds"])
    assert max(one["total_bytes"] for one in other["memory"]["stages"]) == better["total_bytes"]
    assert better["step_seconds"] < asked["time"]["step_seconds"] * (1 - asked["time"]["band"])


@pytest.mark.parametrize(
    ("words", "world"),
    [
        (["experiment=moe_30b_8x64gb"], 8),
        (["experiment=moe_30b_8x64gb", "recompute.modules=[moe]", "recompute.layers=none"], 8),
        (["experiment=moe_30b_8x64gb", "parallel.placement=stage", "parallel.expert=2"], 8),
        (["experiment=twin", "device=cpu"], 8),
        (["experiment=single"], 1),
    ],
)
def test_terms_add_up_to_the_step(words: list[str], world: int, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    assert main(["plan", *words, "--world", str(world), "--json", str(target)]) == 0
    time = json.loads(target.read_text())["time"]
    assert sum(time["terms"].values()) == pytest.approx(time["step_seconds"])
    assert all(seconds >= 0 for seconds in time["terms"].values())


def test_the_full_plan_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=moe_30b_8x64gb", "--full"]) == 0
    shown = capsys.readouterr().out
    for title in ("Layers on stages", "Memory of a rank", "Traffic of a rank", "spent on"):
        assert title in shown


def test_the_docs_have_every_assumption_and_source() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    for name, what in (*ASSUMED.items(), *SOURCES.items()):
        assert f"| {name} | {what.replace('|', '/')} |" in text

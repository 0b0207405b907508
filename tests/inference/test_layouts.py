"""Generation and scoring of one checkpoint: every layout, with and without the cache, alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moe_train
from moe_train.testing import layouts
from moe_train.testing.layouts import Layout, Runs
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world
TRAINED = ("train.steps=20", "checkpoint.every=20")
PROMPTS = ["import os\n", "def main(argv):\n    return", "x", "    if not "]
TOKENS = 24


def _generate(rank: int, world: int, path: str, overrides: list[str], more: dict[str, Any]) -> Any:
    overrides = ["device=cpu", *overrides]
    return moe_train.generate(path, PROMPTS, overrides, tokens=TOKENS, ignore_eod=True, **more)


def _evaluate(rank: int, world: int, path: str, overrides: list[str], more: dict[str, Any]) -> Any:
    return moe_train.evaluate(path, ["device=cpu", *overrides], **more)


@pytest.fixture(scope="module")
def trained(small_runs: Runs) -> Path:
    """A run of which the last checkpoint was written by a spanning layout."""
    return small_runs.get(layouts.PP2_EP2_SPAN, *TRAINED).folder


@pytest.fixture(scope="module")
def single(trained: Path) -> dict[str, dict[str, Any]]:
    """By kind of choice: greedy, and drawn."""
    drawn = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 3}
    return {
        name: run_world(_generate, 1, str(trained), [], more)[0]
        for name, more in (("greedy", {"greedy": True}), ("drawn", drawn))
    }


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [one["tokens"] for one in result["completions"]]


def test_completions(trained: Path, single: dict[str, dict[str, Any]]) -> None:
    for result in single.values():
        assert [len(one) for one in tokens(result)] == [TOKENS] * len(PROMPTS)
        assert [one["prompt"] for one in result["completions"]] == PROMPTS
        assert (result["step"], result["world"], result["layout"]) == (20, 1, "single")
        assert Path(result["checkpoint"]).parent.parent == trained
    assert tokens(single["greedy"]) != tokens(single["drawn"])


LAYOUTS = [
    layouts.TP2_PP2_EP2,
    pytest.param(layouts.TP2, marks=pytest.mark.full),
    pytest.param(layouts.PP2, marks=pytest.mark.full),
    pytest.param(layouts.EP2, marks=pytest.mark.full),
    pytest.param(layouts.TP2_EP2, marks=pytest.mark.full),
    pytest.param(layouts.TP2_ETP2, marks=pytest.mark.full),
    pytest.param(Layout("TP2.ETP2.EP2", 4, layouts.TP2_ETP2_EP2.sizes), marks=pytest.mark.full),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_generates_the_same(
    trained: Path, single: dict[str, dict[str, Any]], layout: Layout
) -> None:
    for name, more in (
        ("greedy", {"greedy": True, "batch": 1}),
        ("drawn", {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 3}),
    ):
        ranks = run_world(
            _generate, layout.world, str(trained), ["parallel=single", *layout.overrides], more
        )
        assert all(tokens(rank) == tokens(ranks[0]) for rank in ranks)
        assert tokens(ranks[0]) == tokens(single[name]), name
        assert ranks[0]["world"] == layout.world


def test_the_cache_changes_nothing(trained: Path, single: dict[str, dict[str, Any]]) -> None:
    more = {"greedy": True, "cache": False}
    [plain] = run_world(_generate, 1, str(trained), [], more)
    assert tokens(plain) == tokens(single["greedy"])
    for one, other in zip(plain["completions"], single["greedy"]["completions"], strict=True):
        assert one["margins"] == pytest.approx(other["margins"], abs=1e-4)


@pytest.mark.full
def test_prompts_of_other_lengths_change_nothing(
    trained: Path, single: dict[str, dict[str, Any]]
) -> None:
    """Each alone and all together: nothing of one prompt reaches another."""
    [alone] = run_world(_generate, 1, str(trained), [], {"greedy": True, "batch": 1})
    assert tokens(alone) == tokens(single["greedy"])


def _command(rank: int, world: int, argv: list[str]) -> int:
    from moe_train.cli import main

    return main(argv)


def test_the_command(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("import\ndef main\n")
    target, log = tmp_path / "out.json", tmp_path / "log"
    argv = ["generate", str(trained), "device=cpu", "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--tokens", "5", "--greedy", "--json", str(target)]
    assert run_world(_command, 1, argv, log=log) == [0], log.read_text()
    content = json.loads(target.read_text())
    for one in content["completions"]:
        assert one["prompt"] + one["text"] in log.read_text()
        assert len(one["tokens"]) == 5 or one["ended"]
    spanning = ["parallel.placement=span", "parallel.pipeline=2", "parallel.expert=2"]
    log.unlink()
    assert run_world(_command, 2, [*argv, "parallel=single", *spanning], log=log) == [2, 2]
    assert "parallel.placement: span does not generate" in log.read_text()


def test_a_checkpoint_without_its_run_needs_the_model(trained: Path, tmp_path: Path) -> None:
    alone, log = tmp_path / "alone", tmp_path / "log"
    shutil.copytree(trained / "checkpoints" / "step_00000020", alone)
    argv = ["generate", str(alone), "device=cpu", "--prompt", "x", "--tokens", "2", "--greedy"]
    assert run_world(_command, 1, argv, log=log) == [4]
    assert "is of another model" in log.read_text()
    model = [override for override in layouts.SMALL if override.startswith("model.")]
    assert run_world(_command, 1, [*argv, "model=twin", *model]) == [0]


@pytest.mark.parametrize(
    "layout",
    [layouts.TP2_PP2_EP4_SPAN, pytest.param(layouts.DP2, marks=pytest.mark.full)],
    ids=lambda layout: layout.name,
)
def test_scores_are_the_same_in_every_layout(trained: Path, tmp_path: Path, layout: Layout) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"value_{n} = {n * n}\n" for n in range(60)))
    more = {"text": str(text)}
    [one] = run_world(_evaluate, 1, str(trained), [], more)
    ranks = run_world(
        _evaluate, layout.world, str(trained), ["parallel=single", *layout.overrides], more
    )
    assert all(rank["loss_hex"] == ranks[0]["loss_hex"] for rank in ranks)
    assert ranks[0]["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert ranks[0]["tokens"] == one["tokens"]


def test_domains_and_choices(trained: Path, tmp_path: Path) -> None:
    domains, choices = tmp_path / "d.jsonl", tmp_path / "c.jsonl"
    lines = [("code", "import os\nimport sys\n" * 20), ("noise", "qzx jvk wqp " * 20)]
    domains.write_text("".join(json.dumps({"domain": d, "text": t}) + "\n" for d, t in lines))
    question = {"context": "import", "choices": ["os", "zqjxkvwq"], "answer": 0}
    choices.write_text(json.dumps(question) + "\n")
    [result] = run_world(_evaluate, 1, str(trained), [], {"domains": str(domains)})
    assert result["domains"]["code"]["loss"] < result["domains"]["noise"]["loss"]
    assert result["tokens"] == sum(part["tokens"] for part in result["domains"].values())
    [result] = run_world(_evaluate, 1, str(trained), [], {"choices": str(choices)})
    assert (result["acc"], result["questions"], result["acc_stderr"]) == (1.0, 1, None)


def test_rows_of_many_lengths_do_not_mix(trained: Path, tmp_path: Path) -> None:
    """More rows than a global batch has, in an order that is not that of their lengths."""
    texts = {f"text{n}": f"value_{n} = {n}\n" * (1 + 5 * n % 7) for n in range(11)}
    answers = []
    for world, layout, names in ((1, [], list(texts)), (2, layouts.PP2.overrides, [*texts][::-1])):
        file = tmp_path / f"{world}.jsonl"
        file.write_text("".join(json.dumps({"domain": n, "text": texts[n]}) + "\n" for n in names))
        overrides = ["parallel=single", *layout]
        result = run_world(_evaluate, world, str(trained), overrides, {"domains": str(file)})[0]
        answers.append({name: part["loss"] for name, part in result["domains"].items()})
    assert answers[0] == pytest.approx(answers[1], rel=1e-6)
    single = tmp_path / "text"
    single.write_text(texts["text4"])
    [alone] = run_world(_evaluate, 1, str(trained), [], {"text": str(single)})
    assert answers[0]["text4"] == pytest.approx(alone["loss"], rel=1e-6)
    assert len({round(loss, 6) for loss in answers[0].values()}) == len(texts)

"""``moe-train evaluate``: the run's own validation loss, in any layout; and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.evaluate import evaluate_main
from moe_train.config.compose import compose
from moe_train.config.schema import to_mapping, with_values
from moe_train.config.sweep import LONGEST, suffixes
from moe_train.errors import EXIT_CONFIG
from moe_train.run.subject import as_overrides
from moe_train.testing.runs import train_run
from moe_train.testing.world import run_world

SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.microbatches=4"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32", "run.seed=7"),
    *("train.steps=4", "train.eval_every=4", "train.eval_batches=3", "checkpoint.every=2"),
]


def _evaluate(rank: int, world: int, argv: list[str]) -> int:
    from moe_train.cli import main

    return main(["evaluate", *argv])


@pytest.mark.world
def test_every_layout_gives_the_validation_loss_of_the_run(tmp_path: Path) -> None:
    run = train_run(tmp_path / "r", SMALL)
    assert run.codes == [0]
    [validation] = [record for record in run.records if "valid_loss" in record]
    before = sorted(path for path in run.folder.rglob("*"))

    def evaluated(world: int, *words: str) -> dict[str, Any]:
        target, log = tmp_path / "loss.json", tmp_path / "log"
        argv = [*words, "device=cpu", "--json", str(target)]
        assert run_world(_evaluate, world, argv, log=log) == [0] * world, log.read_text()
        result: dict[str, Any] = json.loads(target.read_text())
        assert f"{result['loss']:.4f} nats per token" in log.read_text()
        target.unlink()
        log.unlink()
        return result

    # Nothing but the folder: model, data, seed and batch are the run's.
    same = evaluated(1, str(run.folder))
    assert same["loss_hex"] == validation["valid_loss_hex"]
    assert same["unigram_entropy"] == validation["unigram_entropy"]
    assert (same["step"], same["tokens"], same["layout"]) == (4, 3 * 4 * 32, "single")
    assert same["perplexity"] == pytest.approx(2.718281828459045 ** same["loss"])

    split = evaluated(2, str(run.folder), "parallel=single", "parallel.expert=2")
    assert split["layout"] == "EP2" or "EP2" in split["layout"]
    assert split["tokens"] == same["tokens"]
    assert split["loss"] == pytest.approx(same["loss"], rel=1e-6)

    path = run.folder / "checkpoints" / "step_00000002"
    earlier = evaluated(1, str(path))
    assert earlier["step"] == 2 and earlier["loss"] != same["loss"]

    longer = evaluated(1, str(run.folder), "train.eval_batches=1")
    assert longer["tokens"] == 4 * 32 and longer["loss"] != same["loss"]
    assert sorted(path for path in run.folder.rglob("*")) == before


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert evaluate_main([*argv, "device=cpu"]) == EXIT_CONFIG
    return capsys.readouterr().err


def test_config_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder, checkpoint or" in refused(capsys, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.json").write_text("{}")
    assert "no validation data of its own" in refused(capsys, str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert "config.yaml" in refused(capsys, str(tmp_path))
    with pytest.raises(SystemExit):
        evaluate_main([str(tmp_path), "--text", "a", "--choices", "b"])


def test_inherited_settings_survive_the_grammar_of_overrides() -> None:
    """Paths with quotes, commas and spaces, nulls, floats and booleans come back as they were."""
    awkward = [
        *("0.5:it's, here/a b", 'with "quotes"', "back\\slash", "k=v", "end\\", "a\\'b"),
    ]
    values = {
        "data.train": awkward,
        "data.cache": "some where",
        "model.norm_epsilon": 1e-05,
        "model.router.pre_softmax": True,
    }
    wanted = to_mapping(with_values(compose(["experiment=single"]), values))
    overrides = [w for key in ("model", "data") for w in as_overrides(key, wanted[key])]
    result = to_mapping(compose(["experiment=twin", "recompute=none", *overrides]))
    assert (result["model"], result["data"]) == (wanted["model"], wanted["data"])


def test_jobs_of_a_sweep_have_names_of_their_own() -> None:
    assert suffixes([["a.b=1", "c=3"], ["a.b=2e-3", "c=3"]]) == ["-a.b-1", "-a.b-2e-3"]
    assert suffixes([["a=1", "c=3"]]) == [""]
    assert suffixes([["run.name=x"], ["run.name=y"]]) == ["", ""]
    awkward = suffixes([[f"d=[{'x' * 200}/{tail}]"] for tail in "ab"] + [["d=a b"], ["d=a/b"]])
    assert len(set(awkward)) == 4
    for suffix in awkward:
        assert "/" not in suffix and "=" not in suffix and len(suffix) <= LONGEST + 9
    # A sweep that grows keeps the names of the jobs that it had.
    assert suffixes([["a=1"], ["a=2"], ["a=3"]])[:2] == suffixes([["a=1"], ["a=2"]])

"""Models trained by Transformers: generated, scored and trained on here as there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import moe_train
from moe_train.testing.runs import QUIET, finished_run
from moe_train.testing.world import run_world

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support import trained

pytestmark = pytest.mark.world
QUICK = ("qwen3_moe", 60)
PROMPTS = [
    "import os\n",
    "def main(argv):\n    return",
    "    if not ",
    "class Node(ast.AST):\n    def __init__(self, value):\n        self.",
    "# The",
]


@dataclass
class Model:
    """A saved model of Transformers, and the loss of every step that trained it."""

    name: str
    folder: Path
    losses: list[float]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(QUICK, id="qwen3_moe"),
        pytest.param(("qwen3_moe", 300), id="qwen3_moe-300-steps", marks=pytest.mark.full),
        pytest.param(("mixtral", 300), id="mixtral-300-steps", marks=pytest.mark.full),
    ],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Trained by the Trainer."""
    name, steps = request.param
    folder = tmp_path_factory.mktemp(name)
    told = trained.train_and_save(name, folder, steps)
    return Model(name, folder, [step.loss for step in told])


def long(model: Model) -> bool:
    """Whether the model is one of the long test suite."""
    return len(model.losses) > QUICK[1]


def _generate(rank: int, world: int, path: str, tokens: int, more: dict[str, Any]) -> Any:
    extra = {"greedy": True, "ignore_eod": True, **more}
    return moe_train.generate(path, PROMPTS, ["device=cpu"], tokens=tokens, **extra)


def test_greedy_generation_is_theirs(
    model: Model, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = 200 if long(model) else 40
    assert model.losses[-1] < 0.7 * model.losses[0], "it has not learned"
    theirs = trained.greedy(model.folder, PROMPTS, tokens)
    [ours] = run_world(_generate, 1, str(model.folder), tokens, {})
    margins = [margin for one in ours["completions"] for margin in one["margins"]]
    with capsys.disabled():
        print(
            f"\n{model.name}: loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}, "
            f"{len(margins)} tokens, margins: smallest {min(margins):.2e}, "
            f"median {np.median(margins):.3f}"
        )
    assert [one["tokens"] for one in ours["completions"]] == theirs
    assert all(len(one) == tokens for one in theirs)
    if long(model):
        [plain] = run_world(_generate, 1, str(model.folder), tokens, {"cache": False})
        assert [one["tokens"] for one in plain["completions"]] == theirs


def _evaluate(rank: int, world: int, path: str, overrides: list[str], more: Any) -> Any:
    return moe_train.evaluate(path, ["device=cpu", *overrides], **more)


def test_perplexity_is_theirs(model: Model, tmp_path: Path) -> None:
    content = trained.text()[-20_000:] if long(model) else trained.text()[-3000:]
    file = tmp_path / "text"
    file.write_text(content)
    [ours] = run_world(
        _evaluate, 1, str(model.folder), [f"data.sequence={trained.SEQUENCE}"], {"text": str(file)}
    )
    theirs = trained.window_loss(model.folder, content, trained.SEQUENCE)
    assert ours["tokens"] == len(trained.ids_of(model.folder, content)) - 1
    assert ours["loss"] == pytest.approx(theirs, abs=1e-6)
    assert ours["perplexity"] == pytest.approx(np.exp(theirs), abs=1e-4)


def _rows(rank: int, world: int, overrides: list[str], steps: int) -> NDArray[Any]:
    """Token ids of a run's first global batches, [steps x batch, sequence + 1]."""
    from moe_train.backend.select import select_backend
    from moe_train.data.batches import BatchSource
    from moe_train.data.corpus import open_corpus
    from moe_train.run.resolution import resolve_on_all_ranks

    run = resolve_on_all_ranks(["device=cpu", *overrides], 1)
    config = run.config
    select_backend(config.device, config.backend).prepare()
    from moe_train.data.datasets import build_datasets

    train = build_datasets(
        config.data,
        sequence=config.data.sequence,
        seed=config.run.seed,
        train_samples=steps * run.sequences,
        valid_samples=0,
        vocab_limit=run.vocab,
        corpus=open_corpus(config.data),
    ).train
    source = BatchSource(train, run.sequences, run.sequences, 0, 1)
    parts = [source.next_step()[0] for _ in range(steps)]
    rows = [np.concatenate([p["tokens"].numpy(), p["labels"].numpy()[:, -1:]], 1) for p in parts]
    return np.concatenate(rows)


def _command(rank: int, world: int, argv: list[str]) -> int:
    from moe_train.cli import main

    return main(argv)


def test_training_goes_on_here_as_there(model: Model, tmp_path: Path) -> None:
    from moe_train.config.schema import to_mapping
    from moe_train.convert.folder import open_folder
    from moe_train.run.subject import as_overrides

    source, prefix, steps = tmp_path / "text.txt", tmp_path / "data", 3
    source.write_text(trained.text())
    argv = ["data", "prepare", str(source), "--output", str(prefix)]
    argv += ["--tokenizer", str(model.folder / "tokenizer.json")]
    assert run_world(_command, 1, argv) == [0]
    overrides = [
        *as_overrides("model", to_mapping(open_folder(model.folder).model)),
        *("experiment=single", f"data.train=[{prefix}]", f"data.sequence={trained.SEQUENCE}"),
        *(f"batch.global={trained.BATCH}", "batch.micro=2", f"checkpoint.init={model.folder}"),
        *(f"train.steps={steps}", "train.eval_every=0", "checkpoint.every=0"),
        *("optim.lr=3e-3", "optim.schedule=constant", "optim.warmup_steps=0", "optim.clip=1.0"),
    ]
    rows_NS = run_world(_rows, 1, overrides, steps)[0]
    theirs = trained.train(trained.load(model.folder).train(), rows_NS, tmp_path / "t", 3e-3)
    wrong = [*overrides, "model.expert_hidden=32", "run.name=wrong", f"run.dir={tmp_path}"]
    log = tmp_path / "log"
    assert run_world(_command, 1, ["train", *QUIET, *wrong], log=log) == [4]
    assert "model.expert_hidden" in log.read_text() and "Traceback" not in log.read_text()
    layouts: list[tuple[int, list[str]]] = [(1, [])]
    if long(model):
        tensor = ["parallel.tensor=2", "parallel.pipeline=2"]
        span = [*tensor, "parallel.placement=span", "parallel.expert=4"]
        layouts += [(2, ["parallel.expert=2", "optim.distributed=true"])]
        layouts += [(4, [*tensor, "parallel.expert=2"])]
        layouts += [(4, span)] if model.name == "mixtral" else []
    for number, (world, layout) in enumerate(layouts):
        ours = finished_run(tmp_path / f"run{number}", [*overrides, *layout], world)
        # The next step: one set of weights on one batch. The ones after it also have the update.
        for step, bound in ((0, 1e-4), (1, 1e-3), (2, 1e-3)):
            assert ours.column("loss")[step] == pytest.approx(theirs[step].loss, abs=bound)
            norm = ours.column("grad_norm")[step]
            assert norm == pytest.approx(theirs[step].grad_norm, rel=bound, abs=bound), step


TASK = """task: local_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks, out = sys.argv[1:]
told = simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["local_choices"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False), device="cpu",
    batch_size=1, bootstrap_iters=0, log_samples=True,
)
samples = told["samples"]["local_choices"]
right = sum(float(sample["resps"][int(sample["target"])][0][0]) for sample in samples)
json.dump(told["results"]["local_choices"] | {"right": right}, open(out, "w"))
"""


def questions(count: int) -> list[dict[str, Any]]:
    """A piece of the text, its true continuation, and pieces from elsewhere of other lengths."""
    content, draw = trained.text(), np.random.default_rng(5)
    asked = []
    for _ in range(count):
        start = int(draw.integers(0, len(content) - 400))
        context = content[start : start + int(draw.integers(20, 200))]
        choices = [content[start + len(context) :][: int(draw.integers(5, 40))]]
        for _ in range(3):
            other = int(draw.integers(0, len(content) - 100))
            choices.append(content[other : other + int(draw.integers(5, 40))])
        answer = int(draw.integers(0, 4))
        choices[0], choices[answer] = choices[answer], choices[0]
        asked.append({"context": context, "choices": choices, "answer": answer})
    return asked


@pytest.mark.full
def test_choices_are_scored_as_by_lm_eval(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    if not long(model):
        pytest.skip("the longer trained models have this")
    file, tasks, out = tmp_path / "q.jsonl", tmp_path / "tasks", tmp_path / "out.json"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions(60)))
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(file=file))
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    for argv in (["import-hf", model.folder, imported], ["export-hf", imported, exported]):
        assert run_world(_command, 1, [str(word) for word in argv]) == [0]
    command = [sys.executable, "-c", HARNESS, str(exported), str(tasks), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(out.read_text())
    [ours] = run_world(_evaluate, 1, str(imported), [], {"choices": str(file)})
    assert ours["acc"] == pytest.approx(theirs["acc,none"])
    assert ours["acc_norm"] == pytest.approx(theirs["acc_norm,none"])
    assert 0 < ours["acc"] < 1
    assert -ours["loss"] * ours["tokens"] == pytest.approx(theirs["right"], rel=1e-5)
    print(f"\n{model.name}: acc {ours['acc']:.4f}, acc_norm {ours['acc_norm']:.4f}, as lm-eval")

"""Evaluation: loss and perplexity of a model, and its choices, in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.errors import ConfigError, DataError
from moe_train.run.subject import INFERENCE, Subject, read_tokenizer, with_model

if TYPE_CHECKING:
    from moe_train.inference.tasks import Task
    from moe_train.run.opening import Session

NO_RECOMPUTATION = "recompute=none"
"""There is no backward pass to recompute for."""


def evaluate(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    text: str | Path | None = None,
    domains: str | Path | None = None,
    choices: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the validation data of its run, or on one of the given files.

    Collective over the ranks that torchrun started; one rank without it.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.
        overrides: Hydra overrides; model, data and batch are the run's, the layout is free.
        text: a UTF-8 text file.
        domains: a jsonl file of texts, ``{"domain": "code", "text": "..."}`` a line.
        choices: a jsonl file of questions,
            ``{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`` a line.

    Returns:
        ``loss`` (nats per token), ``loss_hex``, ``perplexity``, ``tokens``, ``sequences``,
        ``step``, ``checkpoint``, ``layout`` and ``world``, the same on every rank;
        ``unigram_entropy`` for validation data, on rank 0; ``domains`` with the first four by
        name; ``questions``, ``acc`` and ``acc_norm`` with ``_stderr``, loss then being that of the
        right choices.

    Raises:
        ConfigError: the overrides are refused.
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: the data cannot be read.
        MemoryFault: a rank ran out of memory.
    """
    files = [name for name in (text, domains, choices) if name is not None]
    if len(files) > 1:
        raise ConfigError("evaluate", "has several files", "one of text, domains and choices")
    subject = Subject.at(path)
    if files:
        return with_model(
            subject,
            overrides,
            [NO_RECOMPUTATION, *INFERENCE],
            partial(_score, text, domains, choices),
            read=read_tokenizer,
        )
    if subject.kind == "huggingface" and not any("data.valid=" in one for one in overrides):
        raise ConfigError(
            str(path), "has no validation data of its own", "text, domains, choices or data.valid"
        )
    return with_model(subject, overrides, [NO_RECOMPUTATION], _validate)


def _validate(session: Session) -> dict[str, Any]:
    from moe_train.data.batches import BatchSource
    from moe_train.data.datasets import build_datasets
    from moe_train.data.statistics import dataset_entropy
    from moe_train.train.step import validate

    config, data = session.config, session.engine.groups.dp
    samples = config.train.eval_batches * session.run.sequences
    valid = build_datasets(
        config.data,
        sequence=config.data.sequence,
        seed=config.run.seed,
        train_samples=0,
        valid_samples=samples,
        vocab_limit=session.run.vocab,
        corpus=session.corpus,
    ).valid
    source = BatchSource(valid, session.run.sequences, config.batch.micro, data.rank(), data.size())
    batches = (source.next_step() for _ in range(config.train.eval_batches))
    loss = validate(session.engine, list(batches))
    return {
        "loss": loss,
        "loss_hex": loss.hex(),
        # The perplexity of a diverged model overflows a float; JSON has no infinity.
        "perplexity": math.exp(loss) if loss < 700 else None,
        "tokens": samples * config.data.sequence,
        "sequences": samples,
        "unigram_entropy": dataset_entropy(valid, samples) if session.rank == 0 else None,
    }


def _score(
    text: str | Path | None,
    domains: str | Path | None,
    choices: str | Path | None,
    session: Session,
) -> dict[str, Any]:
    from moe_train.inference.scoring import log_likelihoods
    from moe_train.run.broadcast import broadcast_or_raise

    task: Task | None = None
    fault: DataError | None = None
    try:
        task = _task(session, text, domains, choices)
        for row in task.rows:
            if max(row.tokens) >= session.run.vocab:
                raise DataError(
                    "data.tokenizer",
                    f"token {max(row.tokens)} is beyond the model's {session.run.vocab}",
                    "the tokenizer that the model was trained with",
                )
    except DataError as unusable:
        fault = unusable
    broadcast_or_raise(fault, None)
    assert task is not None
    scores = log_likelihoods(session.engine, task.rows)
    return task.result(scores) | {"sequences": len(task.rows)}


def _task(
    session: Session,
    text: str | Path | None,
    domains: str | Path | None,
    choices: str | Path | None,
) -> Task:
    from moe_train.inference import tasks

    tokenizer, length = session.corpus.tokenizer, session.config.data.sequence
    if tokenizer is None:
        raise DataError(
            "data.tokenizer", "is not known for these data", "data.tokenizer=tokenizer.json"
        )
    if choices is not None:
        questions = tasks.read_questions(Path(choices))
        return tasks.ChoiceTask(questions, tokenizer, length, str(choices))
    source = domains if domains is not None else text
    assert source is not None
    read: Callable[[Path], list[tuple[str, str]]]
    read = tasks.read_text if domains is None else tasks.read_domains
    return tasks.TextTask(read(Path(source)), tokenizer, length, str(source))

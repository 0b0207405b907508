"""Generation: new tokens for prompts from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.errors import ConfigError, ConfigFaults, DataError
from moe_train.inference.request import Request, Sampling
from moe_train.run.subject import INFERENCE, Subject, read_tokenizer, with_model

if TYPE_CHECKING:
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.run.opening import Session

PASSES = ("recompute=none", "batch.global=null")
"""A pass has no backward and no global batch."""

Prompt = str | Sequence[int]


def generate(
    path: str | Path,
    prompts: Sequence[Prompt],
    overrides: Sequence[str] = (),
    *,
    tokens: int = 100,
    sampling: Sampling | None = None,
    cache: bool = True,
    ignore_eod: bool = False,
    batch: int = 8,
) -> dict[str, Any]:
    """Continue prompts; collective over the ranks that torchrun started, one rank without it.

    Capacity limits and forced balance of the router are off: no token is dropped.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.
        prompts: texts, or token ids.
        overrides: Hydra overrides, such as ``parallel.tensor=2``.
        tokens: most new tokens of a prompt.
        sampling: None is greedy.
        cache: keep keys and values; without it every token computes its whole sequence again.
        ignore_eod: go on after the end-of-document token.
        batch: prompts that a replica computes together.

    Returns:
        ``completions`` (``prompt``, ``text``, ``prompt_tokens``, ``tokens``, ``margins``,
        ``ended``), ``seconds``, ``step``, ``checkpoint``, ``layout`` and ``world``, the same on
        every rank but for the seconds. A margin is the difference of the two largest logits.

    Raises:
        ConfigError: the overrides or sampling are refused.
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: the tokenizer cannot be read, or a prompt has no tokens.
        MemoryFault: a rank ran out of memory.
    """
    chosen = Sampling(greedy=True) if sampling is None else sampling
    faults = list(chosen.faults())
    for name, value in (("tokens", tokens), ("batch", batch)):
        if value < 1:
            faults.append(ConfigError(name, f"{value} is not a number of {name}", "1 or more"))
    if not prompts:
        faults.append(ConfigError("prompts", "there is none", "give one or more"))
    if faults:
        raise ConfigFaults(faults)
    return with_model(
        Subject.at(path),
        overrides,
        [*PASSES, *INFERENCE],
        partial(_generate, prompts, tokens, chosen, cache, ignore_eod, batch),
        read=read_tokenizer,
        check=_refuse_layout,
        sequence_parallel=False,
    )


def _refuse_layout(run: ResolvedRun) -> None:
    """Layouts whose passes exist only inside a training schedule.

    Raises:
        ConfigError: the layout is one.
    """
    layout = run.layout
    for key, wrong in (
        ("placement", layout.span),
        ("virtual_pipeline", layout.virtual_pipeline > 1),
        ("context", layout.context > 1),
    ):
        if wrong:
            raise ConfigError(
                f"parallel.{key}",
                f"{getattr(run.config.parallel, key)} does not generate",
                "tensor, pipeline, expert and data parallelism do; weights load in any of them",
            )


def _generate(
    prompts: Sequence[Prompt],
    tokens: int,
    sampling: Sampling,
    cache: bool,
    ignore_eod: bool,
    batch: int,
    session: Session,
) -> dict[str, Any]:
    from moe_train.inference.generate import generate
    from moe_train.run.broadcast import broadcast_or_raise

    encoded: list[list[int]] = []
    fault: DataError | None = None
    try:
        encoded = [_encode(session, prompt) for prompt in prompts]
    except DataError as unusable:
        fault = unusable
    broadcast_or_raise(fault, None)
    eod = None if ignore_eod else session.corpus.eod
    begin = time.perf_counter()
    completions = generate(
        session.engine, encoded, Request(tokens, sampling, eod, cache=cache, batch=batch)
    )
    tokenizer = session.corpus.tokenizer
    return {
        "completions": [
            {
                "prompt": prompt if isinstance(prompt, str) else None,
                "text": tokenizer.decode(one.tokens) if tokenizer else None,
                "prompt_tokens": ids,
                "tokens": one.tokens,
                "margins": one.margins,
                "ended": one.ended,
            }
            for prompt, ids, one in zip(prompts, encoded, completions, strict=True)
        ],
        "seconds": time.perf_counter() - begin,
    }


def _encode(session: Session, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; an empty one is the end of a document, after which another begins."""
    tokenizer, eod = session.corpus.tokenizer, session.corpus.eod
    if isinstance(prompt, str):
        if tokenizer is None:
            raise DataError(
                "data.tokenizer", "is not known for these data", "data.tokenizer=tokenizer.json"
            )
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
    if not ids and eod is not None:
        ids = [eod]
    if not ids:
        raise DataError("prompt", "has no tokens", "give a longer prompt")
    if not 0 <= min(ids) <= max(ids) < session.run.vocab:
        raise DataError(
            "prompt", f"token {max(ids)} is beyond the model's {session.run.vocab}", "other tokens"
        )
    return ids

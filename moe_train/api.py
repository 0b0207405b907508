"""Python API: what the commands do, as functions. Import the names from ``moe_train``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from moe_train.config.root import Config
    from moe_train.convert.exporting import Exported
    from moe_train.convert.importing import Imported
    from moe_train.convert.verifying import Verified
    from moe_train.train.callback import Callback


def load_config(overrides: Sequence[str] = ()) -> Config:
    """The typed configuration that Hydra ``overrides`` compose; imports no torch.

    Raises:
        ConfigFaults: all faults together.
    """
    from moe_train.config.compose import compose

    return compose(overrides)


def plan(overrides: Sequence[str] = (), world: int = 8) -> dict[str, Any]:
    """The plan of a run on ``world`` ranks, as in ``plan.json``; imports no torch.

    Returns:
        Among others ``parameters``, ``memory`` (bytes per stage), ``time`` and ``layout``;
        ``fits`` is False where a stage needs more than the device's memory.

    Raises:
        ConfigFaults: all faults together, with the nearest legal layouts.
    """
    from moe_train.planner.estimate import estimate
    from moe_train.planner.resolution import resolve_run

    return estimate(resolve_run(overrides, world)).report()


def tune(overrides: Sequence[str] = (), world: int = 8, count: int = 5) -> dict[str, Any]:
    """The fastest layouts and options for a run on ``world`` ranks; imports no torch.

    Args:
        overrides: keys set by themselves (``parallel.tensor=2``) are fixed.
        count: layouts to return.

    Returns:
        As ``moe-train tune --json``: ``top`` (each with ``overrides``, ``step_seconds``,
        ``memory_share``, ``separated_by``), ``pareto`` and ``requested``.

    Raises:
        ConfigFaults: an override is refused.
        ConfigError: no layout is legal.
    """
    from moe_train.planner.search.tuning import tune as search

    return search(overrides, world, count=count).report()


def train_model(overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> int:
    """Train on this process's rank, like ``train.py``; errors are reported, not raised.

    Args:
        callbacks: called after the built-in ones, on every rank.

    Returns:
        The exit code (see :mod:`moe_train.errors`); 0 when the run finished.
    """
    from moe_train.run.main import main

    return main(overrides, callbacks)


def evaluate(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    text: str | Path | None = None,
    domains: str | Path | None = None,
    choices: str | Path | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and choices; see :func:`moe_train.run.evaluation.evaluate`."""
    from moe_train.run.evaluation import evaluate as run_evaluation
    from moe_train.run.logs import logging_to_console

    with logging_to_console():
        return run_evaluation(path, overrides, text=text, domains=domains, choices=choices)


def generate(
    path: str | Path,
    prompts: Sequence[str | Sequence[int]],
    overrides: Sequence[str] = (),
    *,
    tokens: int = 100,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1234,
    cache: bool = True,
    ignore_eod: bool = False,
    batch: int = 8,
) -> dict[str, Any]:
    """Continue prompts; see :func:`moe_train.run.generation.generate` and
    :class:`moe_train.inference.request.Sampling`."""
    from moe_train.inference.request import Sampling
    from moe_train.run.generation import generate as run_generation
    from moe_train.run.logs import logging_to_console

    with logging_to_console():
        return run_generation(
            path,
            prompts,
            overrides,
            tokens=tokens,
            sampling=Sampling(greedy, temperature, top_k, top_p, seed),
            cache=cache,
            ignore_eod=ignore_eod,
            batch=batch,
        )


def export_hf(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    shard_gb: float = 5.0,
) -> Exported:
    """Write the checkpoint of a run folder, or a checkpoint, as a Hugging Face folder.

    Args:
        tokenizer: ``byte``, a tokenizer.json, ``none``; None is that of the run's data.

    Raises:
        MoeTrainError: see :func:`moe_train.convert.exporting.export_checkpoint`.
    """
    from pathlib import Path

    from moe_train.convert.exporting import export_checkpoint
    from moe_train.convert.source import open_source, tokens_for

    source = open_source(Path(path), overrides)
    return export_checkpoint(
        source.checkpoint,
        Path(out),
        source.config,
        tokens=tokens_for(source, tokenizer),
        facts=source.facts,
        shard_bytes=int(shard_gb * 1e9),
    )


def import_hf(path: str | Path, out: str | Path) -> Imported:
    """Import a Hugging Face folder; see :func:`moe_train.convert.importing.import_folder`."""
    from pathlib import Path

    from moe_train.convert.importing import import_folder

    return import_folder(Path(path), Path(out))


def verify_hf(path: str | Path) -> Verified:
    """Compare an exported folder with its record, without torch; see
    :func:`moe_train.convert.verifying.verify_folder`."""
    from pathlib import Path

    from moe_train.convert.verifying import verify_folder

    return verify_folder(Path(path))

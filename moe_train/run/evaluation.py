"""Evaluation: loss and perplexity of a checkpoint on validation data, in any layout."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.compose import collect, group_options
from moe_train.config.files import read_config
from moe_train.errors import ConfigError
from moe_train.run.failure import diagnose
from moe_train.run.resolution import resolve_on_all_ranks
from moe_train.run.state import RunState
from moe_train.run.torchelastic import world_of_process
from moe_train.run_folder.folder import RunFolder, default_run_name

if TYPE_CHECKING:
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.run.opening import Session

INHERITED = ("model", "data", "dtype", "run.seed", "batch", "train.eval_batches")
"""Config keys that an evaluation takes from its run's config.yaml; the layout is free."""


def evaluate(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the newest checkpoint of ``run.name``, or the one of ``checkpoint.resume``.

    Collective over the ranks that torchrun started; one rank without it.

    Returns:
        ``loss`` (nats per token), ``loss_hex``, ``perplexity``, ``tokens``, ``sequences``,
        ``step``, ``checkpoint``, ``layout``, ``world``, the same on every rank, and
        ``unigram_entropy`` on rank 0.

    Raises:
        ConfigError: the overrides are refused.
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: the validation data cannot be read.
        MemoryFault: a rank ran out of memory.
    """
    rank, world = world_of_process()
    run, checkpoints = _resolve(overrides, world)
    try:
        return _evaluate(run, checkpoints, rank)
    except Exception as error:
        known = diagnose(error, RunState(), run)
        if known is None or known is error:
            raise
        raise known from error


def _evaluate(run: ResolvedRun, checkpoints: Path, rank: int) -> dict[str, Any]:
    from moe_train.run.opening import open_session

    with ExitStack() as stack:
        session = open_session(run, rank, stack)
        # Imports Megatron, for which the backend prepares the process first.
        from moe_train.run.weights import load_weights

        resume = run.config.checkpoint.resume
        names = _runs(checkpoints.parent.parent)
        folder, manifest = load_weights(
            session,
            checkpoints.parent if resume == "auto" else Path(resume),
            f"checkpoint.resume=PATH or run.name=NAME; runs with checkpoints: {names}",
        )
        return _measure(session) | {
            "step": manifest.step,
            "checkpoint": str(folder),
            "layout": run.layout.tag,
            "world": run.layout.world,
        }


def _measure(session: Session) -> dict[str, Any]:
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


def _resolve(overrides: Sequence[str], world: int) -> tuple[ResolvedRun, Path]:
    """The evaluation, resolved with its run's settings, and the folder of checkpoints.

    Raises:
        ConfigFaults: all faults together.
    """
    given, _ = collect(overrides)
    resume = given.checkpoint.resume
    if resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never: no checkpoint to evaluate",
            "auto (the newest of run.name), or the path of a checkpoint",
        )
    folder: Path | None = None
    if resume != "auto":
        folder = Path(resume).resolve().parent.parent
    elif given.run.name:
        folder = Path(given.run.dir) / given.run.name
    inherited = _inherited(RunFolder(folder), overrides) if folder else []
    # There is no backward pass to recompute for.
    arguments = [*inherited, *overrides, "recompute=none"]
    run = resolve_on_all_ranks(arguments, world)
    if folder is None:
        config = run.config
        folder = Path(config.run.dir) / default_run_name(config.experiment, run.layout.tag)
        if again := _inherited(RunFolder(folder), overrides):
            run = resolve_on_all_ranks([*again, *arguments], world)
    return run, RunFolder(folder).checkpoints


def _inherited(folder: RunFolder, overrides: Sequence[str]) -> list[str]:
    """The settings of the evaluated run as overrides; none where it wrote no config."""
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(folder.plan), str(error), "restore it from a copy") from error
    config = read_config(folder.config)
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    chosen = keys & set(group_options())
    arguments: list[str] = []
    for key in INHERITED:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None and key not in chosen:
            arguments += _as_overrides(key, node)
    # The run's global batch, whatever data-parallel size evaluates it: the same tokens.
    if not any(override.lstrip("+").startswith("batch.") for override in overrides):
        arguments.append(f"batch.global={plan['batch']['sequences_per_step']}")
    return arguments


def _as_overrides(key: str, node: Any) -> list[str]:
    if isinstance(node, Mapping):
        return [one for name in node for one in _as_overrides(f"{key}.{name}", node[name])]
    return [f"{key}={_quoted(node)}"]


def _quoted(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if isinstance(value, str):
        # Backslashes are literal except before a quote, the closing one included.
        text = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"
    return repr(value)


def _runs(parent: Path) -> str:
    """Names of the runs that have checkpoints."""
    names = [path.parent.parent.name for path in parent.glob("*/checkpoints/step_????????")]
    return ", ".join(sorted(set(names))[:10]) or "none"

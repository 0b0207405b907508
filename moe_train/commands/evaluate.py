"""``moe-train evaluate``: loss and perplexity of a checkpoint, in any layout, weights only."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.compose import collect, group_options
from moe_train.config.files import read_config
from moe_train.errors import EXIT_FINISHED, CheckpointError, ConfigError, MoeTrainError
from moe_train.run.failure import diagnose, report_error
from moe_train.run.logs import logging_to_console
from moe_train.run.resolution import resolve_on_all_ranks
from moe_train.run.state import RunState
from moe_train.run.torchelastic import world_of_process
from moe_train.run_folder.files import write_atomically
from moe_train.run_folder.folder import RunFolder, default_run_name

if TYPE_CHECKING:
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.run.opening import Session

EXAMPLES = """examples:
  moe-train evaluate run.name=twin-TP2.PP4.EP8.span
  moe-train evaluate checkpoint.resume=runs/x/checkpoints/step_00000100 --json loss.json
  moe-train evaluate run.name=notes data.valid=[data/held_out] train.eval_batches=20
  torchrun --nproc-per-node 4 -m moe_train.cli evaluate run.name=notes parallel.expert=4

Model, data and batch are those of the checkpoint's run, unless overridden; the layout is chosen
for the ranks that there are. exit code: 0; 2 config, 3 data, 4 checkpoint, 7 memory
"""

INHERITED = ("model", "data", "dtype", "run.seed", "batch", "train.eval_batches")
"""What an evaluation takes from its run's config.yaml; the layout is free."""


def evaluate_main(argv: Sequence[str]) -> int:
    """Run ``moe-train evaluate`` on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="moe-train evaluate",
        description="Loss (nats per token) and perplexity of a checkpoint on validation data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    asked = parser.parse_intermixed_args(argv)
    with logging_to_console():
        try:
            rank, world = world_of_process()
            run, root = _resolve(asked.overrides, world)
            try:
                found = evaluate(run, root, rank)
            except Exception as failure:
                known = diagnose(failure, RunState(), run)
                if known is None or known is failure:
                    raise
                raise known from failure
            if rank == 0:
                _show(found, asked.json)
            return EXIT_FINISHED
        except MoeTrainError as fault:
            return report_error(fault)


def evaluate(run: ResolvedRun, root: Path, rank: int) -> dict[str, Any]:
    """Evaluate a checkpoint; the same result on every rank, unigram entropy on rank 0 alone.

    Args:
        root: folder of checkpoints, of which ``checkpoint.resume=auto`` takes the newest.

    Raises:
        MoeTrainError: see the rooms.
    """
    from moe_train.run.opening import open_session

    with ExitStack() as stack:
        session = open_session(run, rank, stack)
        # Only now: it imports Megatron, which the backend had to prepare for.
        from moe_train.run.restore import restore

        folder, manifest = restore(session, root, run.config.checkpoint.resume, weights_only=True)
        if folder is None or manifest is None:
            raise CheckpointError(
                str(root),
                "has no committed checkpoint to evaluate",
                "checkpoint.resume=PATH or run.name=NAME; there are: " + _runs(root.parent.parent),
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
    from moe_train.data.entropy import dataset_entropy
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
        # A hopeless model's perplexity is beyond a float; JSON has no word for infinity.
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
    asked, _ = collect(overrides)
    resume = asked.checkpoint.resume
    if resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never leaves nothing to evaluate",
            "auto (the newest of run.name), or the PATH of a checkpoint",
        )
    folder: Path | None = None
    if resume != "auto":
        folder = Path(resume).resolve().parent.parent
    elif asked.run.name:
        folder = Path(asked.run.dir) / asked.run.name
    inherited = _inherited(RunFolder(folder), overrides) if folder else []
    # Nothing is differentiated, so nothing is recomputed.
    words = [*inherited, *overrides, "recompute=none"]
    run = resolve_on_all_ranks(words, world)
    if folder is None:
        config = run.config
        folder = Path(config.run.dir) / default_run_name(config.experiment, run.layout.tag)
        if again := _inherited(RunFolder(folder), overrides):
            run = resolve_on_all_ranks([*again, *words], world)
    return run, RunFolder(folder).checkpoints


def _inherited(folder: RunFolder, overrides: Sequence[str]) -> list[str]:
    """The run's own settings as overrides; none where it has left no readable config."""
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(folder.plan), str(error), "restore it from a copy") from error
    config = read_config(folder.config)
    chosen = {word.partition("=")[0].lstrip("+") for word in overrides} & set(group_options())
    words: list[str] = []
    for key in INHERITED:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None and key not in chosen:
            words += _words(key, node)
    # The run's global batch, whatever data-parallel size evaluates it: the same tokens.
    if not any(word.lstrip("+").startswith("batch.") for word in overrides):
        words.append(f"batch.global={plan['batch']['sequences_per_step']}")
    return words


def _words(key: str, node: Any) -> list[str]:
    if isinstance(node, Mapping):
        return [word for name, value in node.items() for word in _words(f"{key}.{name}", value)]
    return [f"{key}={_quoted(node)}"]


def _quoted(value: Any) -> str:
    """A value in the grammar of overrides."""
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


def _show(found: Mapping[str, Any], target: Path | None) -> None:
    """Print the result, and write it to ``target``.

    Raises:
        ConfigError: ``target`` cannot be written.
    """
    entropy, loss = found["unigram_entropy"], found["loss"]
    rows = [
        ("checkpoint", f"{found['checkpoint']} (step {found['step']})"),
        ("layout", f"{found['layout']} on {found['world']} rank(s)"),
        ("tokens", f"{found['tokens']:,}"),
        ("loss", f"{loss:.4f} nats per token"),
        ("perplexity", "beyond e^700" if found["perplexity"] is None else f"{math.exp(loss):,.2f}"),
        ("unigram entropy", f"{entropy:.4f} ({'loss below' if loss < entropy else 'not below'})"),
    ]
    for label, value in rows:
        print(f"{label:<16}{value}")
    sys.stdout.flush()
    if target is not None:
        try:
            write_atomically(target, json.dumps(dict(found), indent=1) + "\n")
        except OSError as error:
            raise ConfigError("--json", str(error), "give a writable file") from error

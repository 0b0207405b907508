"""Find, check and load the checkpoint that a program starts from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.checkpoint.choose import find_checkpoint
from moe_train.checkpoint.load import check_fits, load_checkpoint
from moe_train.checkpoint.manifest import Manifest
from moe_train.errors import CheckpointError
from moe_train.parallel.resolved import ResolvedRun
from moe_train.run.broadcast import broadcast_or_raise
from moe_train.run.opening import Session

LOGGER = logging.getLogger(__name__)


def restore(
    session: Session, root: Path, resume: str, *, weights_only: bool = False
) -> tuple[Path, Manifest] | tuple[None, None]:
    """Load what ``checkpoint.resume`` asks for; collective.

    Args:
        root: folder of the run's checkpoints.
        resume: auto | never | PATH.
        weights_only: leave optimizer and random states as they are.

    Returns:
        The checkpoint's folder and manifest, or two Nones where there is nothing to load.

    Raises:
        CheckpointError: damaged, or of another model or tokenizer; the same on every rank.
    """
    found, warnings = find_checkpoint(root, resume)
    for warning in warnings:
        LOGGER.warning("passed over a damaged checkpoint: %s", warning)
    if found is None:
        return None, None
    facts = session.facts()
    manifest = _check(found, facts)
    restored = load_checkpoint(
        found,
        manifest,
        chunks=[chunk.module for chunk in session.engine.chunks],
        optimizer=None if weights_only else session.engine.optimizer,
        layout=facts["layout"],
    )
    if not weights_only:
        moved = "" if restored else f" (written in layout {manifest.layout})"
        LOGGER.info("resumed %s at step %d%s", found, manifest.step, moved)
        for warning in _other_data(manifest, session.run):
            LOGGER.warning(warning)
    return found, manifest


def _other_data(manifest: Manifest, run: ResolvedRun) -> Iterator[str]:
    """What to say where the steps from here on are of other samples than those before.

    Replicas run micro-batches of their own, so another layout may mean another global batch.
    """
    samples, batch = manifest.consumed_samples, run.sequences
    sequence, seed = run.config.data.sequence, run.config.run.seed
    if manifest.step and samples != manifest.step * batch:
        before = samples / manifest.step
        yield (
            f"a step has {batch} sequences from here on and had {before:g} until now, which makes "
            f"another loss curve; batch.global={round(before)} keeps it"
        )
    other = []
    if samples and manifest.consumed_tokens != samples * sequence:
        other.append(f"data.sequence={sequence}, not {manifest.consumed_tokens / samples:g}")
    if manifest.seed != seed:
        other.append(f"run.seed={seed}, not {manifest.seed}")
    if other:
        yield (
            f"{' and '.join(other)}: samples are cut and shuffled anew, so that some text comes "
            "again and some never; counts of samples and tokens go on as if all were of this kind"
        )


def _check(found: Path, facts: dict[str, Any]) -> Manifest:
    """Every rank reads the manifest: one that does not see the folder must not hang the rest."""
    fault: CheckpointError | None = None
    manifest: Manifest | None = None
    try:
        manifest = check_fits(found, facts["model"], facts["tokenizer"])
    except CheckpointError as misfit:
        fault = misfit
    shared = broadcast_or_raise(fault, manifest)
    assert shared is not None
    return shared

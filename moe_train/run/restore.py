"""Restores the session's model, optimizer and random states from the selected checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from moe_train.checkpoint.load import load_checkpoint
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.select import select_checkpoint
from moe_train.errors import CheckpointError
from moe_train.parallel.resolved import ResolvedRun
from moe_train.run.opening import Session
from moe_train.run.state import RunState

LOGGER = logging.getLogger(__name__)


def restore(
    session: Session,
    root: Path,
    resume: str,
    *,
    state: RunState | None = None,
) -> tuple[Path, Manifest] | tuple[None, None]:
    """Load the checkpoint that :func:`select_checkpoint` returns; collective.

    Args:
        root: folder of the run's checkpoints.
        resume: auto | never | PATH.
        state: of a run that starts, which gets the checkpoint's step, or the refusal.

    Returns:
        The checkpoint's folder and manifest, or two Nones where there is nothing to load.

    Raises:
        CheckpointError: damaged, or of another model or tokenizer; the same on every rank.
    """
    fields = session.manifest_fields()
    try:
        selected = select_checkpoint(
            root, resume, model=fields["model"], tokenizer=fields["tokenizer"]
        )
    except CheckpointError:
        if state is not None:
            state.refuse()
        raise
    if selected is None:
        return None, None
    folder, manifest = selected
    if state is not None:
        state.step = manifest.step
    restored = load_checkpoint(
        folder,
        manifest,
        chunks=session.modules,
        optimizer=session.engine.optimizer,
        layout=fields["layout"],
    )
    moved = "" if restored else f" (written in layout {manifest.layout})"
    LOGGER.info("resumed %s at step %d%s", folder, manifest.step, moved)
    for warning in _changed_data(manifest, session.run):
        LOGGER.warning(warning)
    return folder, manifest


def _changed_data(manifest: Manifest, run: ResolvedRun) -> Iterator[str]:
    """Warnings where the steps from here on take other samples than those before.

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
            f"{' and '.join(other)}: samples are cut and shuffled again, so that some text is "
            "repeated and some is never seen; counts of samples and tokens continue as they were"
        )

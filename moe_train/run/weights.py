"""Weights of a run folder or a checkpoint into a session's model, and nothing else of it."""

from __future__ import annotations

import logging
from pathlib import Path

from moe_train.checkpoint.collective import run_on_all_ranks
from moe_train.checkpoint.load import load_checkpoint
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.optimizer_state import (
    MASTER,
    initialise_state,
    master_from_model,
    state_names,
)
from moe_train.checkpoint.select import select_checkpoint
from moe_train.errors import CheckpointError
from moe_train.run.opening import Session
from moe_train.run_folder.folder import RunFolder

LOGGER = logging.getLogger(__name__)


def load_weights(session: Session, path: Path, otherwise: str) -> tuple[Path, Manifest]:
    """Load the weights of a checkpoint, or of the newest sound one of a run folder; collective.

    They may come from any layout; the optimizer is left as it is.

    Args:
        otherwise: what to do without the checkpoint, for the message of a refusal.

    Returns:
        The checkpoint's folder and manifest.

    Raises:
        CheckpointError: missing, damaged, or of another model or tokenizer; the same on every rank.
    """
    checkpoints = RunFolder(path).checkpoints
    # The ranks have to take one path through the collectives below.
    (is_run, *_) = run_on_all_ranks(checkpoints.is_dir, path, "cannot be read", otherwise)
    fields = session.manifest_fields()
    selected = select_checkpoint(
        checkpoints,
        "auto" if is_run else str(path),
        model=fields["model"],
        tokenizer=fields["tokenizer"],
        otherwise=otherwise,
    )
    if selected is None:
        raise CheckpointError(str(path), "has no committed checkpoint", otherwise)
    folder, manifest = selected
    load_checkpoint(
        folder,
        manifest,
        chunks=[chunk.module for chunk in session.engine.chunks],
        optimizer=None,
        layout=fields["layout"],
    )
    return folder, manifest


def start_from(session: Session, path: str) -> None:
    """Give a new run the weights of ``checkpoint.init``; collective.

    The optimizer's master copies are those weights, whatever precision their own run had: the
    first step computes with the model that an evaluation or an export of ``path`` has.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    folder, manifest = load_weights(
        session, Path(path), "without checkpoint.init a run starts with random weights"
    )
    optimizer = session.engine.optimizer
    if MASTER in state_names(optimizer):
        initialise_state(optimizer)
        master_from_model(optimizer)
    LOGGER.info("starts with the weights of %s (step %d)", folder, manifest.step)

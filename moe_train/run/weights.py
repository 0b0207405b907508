"""Weights of a run, a checkpoint or a foreign model into a session's model, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from moe_train.checkpoint.collective import run_on_all_ranks
from moe_train.checkpoint.load import load_checkpoint
from moe_train.checkpoint.optimizer_state import (
    MASTER,
    initialise_state,
    master_from_model,
    state_names,
)
from moe_train.checkpoint.select import select_checkpoint
from moe_train.convert.folder import is_hf_folder, open_folder
from moe_train.convert.loading import check_model
from moe_train.convert.loading import load_weights as load_foreign_weights
from moe_train.errors import CheckpointError
from moe_train.run.opening import Session
from moe_train.run_folder.folder import RunFolder

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Where weights come from."""

    path: Path
    """The checkpoint's folder, or the foreign model's."""
    step: int | None
    """None for a foreign model."""


def load_weights(session: Session, path: Path, otherwise: str) -> Loaded:
    """Load the weights of a checkpoint, a run folder's newest sound one or a Hugging Face folder.

    Collective. The weights may come from any layout; the optimizer is left as it is.

    Args:
        otherwise: what to do without the checkpoint, for the message of a refusal.

    Raises:
        CheckpointError: missing, damaged, or of another model or tokenizer; the same on every rank.
    """
    checkpoints = RunFolder(path).checkpoints
    # The ranks have to take one path through the collectives below.
    ((is_run, is_foreign), *_) = run_on_all_ranks(
        lambda: (checkpoints.is_dir(), is_hf_folder(path)), path, "cannot be read", otherwise
    )
    if is_foreign and not is_run:
        run_on_all_ranks(
            lambda: _load_foreign(session, path), path, "does not fit this run", otherwise
        )
        return Loaded(path, None)
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
        chunks=session.modules,
        optimizer=None,
        layout=fields["layout"],
    )
    return Loaded(folder, manifest.step)


def _load_foreign(session: Session, path: Path) -> None:
    folder = open_folder(path)
    check_model(folder, session.config.model, session.run.padded_vocab)
    load_foreign_weights(folder, session.modules)


def start_from(session: Session, path: str) -> None:
    """Give a new run the weights of ``checkpoint.init``; collective.

    The optimizer's master copies are those weights, whatever precision their own run had: the
    first step computes with the model that an evaluation or an export of ``path`` has.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    loaded = load_weights(
        session, Path(path), "without checkpoint.init a run starts with random weights"
    )
    optimizer = session.engine.optimizer
    if MASTER in state_names(optimizer):
        initialise_state(optimizer)
        master_from_model(optimizer)
    step = "" if loaded.step is None else f" (step {loaded.step})"
    LOGGER.info("starts with the weights of %s%s", loaded.path, step)

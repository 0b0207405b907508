"""Selects the checkpoint to resume or start from: the newest one that verifies and fits the run.

All ranks verify a checkpoint together, each an even share of its bytes, and act on one verdict.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import folders
from moe_train.checkpoint.collective import run_on_all_ranks
from moe_train.checkpoint.digests import blocks, rank_share
from moe_train.checkpoint.manifest import NAME, Manifest, check_blocks, check_files, read_manifest
from moe_train.errors import CheckpointError
from moe_train.features.balancing import BALANCING
from moe_train.files import json_digest

_UNREADABLE = "cannot be read"
_LIST = "look at the disk: moe-train checkpoint list RUN shows what is sound"

LOGGER = logging.getLogger(__name__)


NEW_RUN = "run.name=NAME starts a new run"


def select_checkpoint(
    root: Path, resume: str, *, model: dict[str, Any], tokenizer: str, otherwise: str = NEW_RUN
) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from; collective over the world, the same on every rank.

    The newest checkpoint is verified first, by all ranks together; damage that one of them sees
    sends all of them on to the next older one.

    Args:
        root: ``checkpoints/`` of the run folder; rank 0's view of it counts.
        resume: ``auto`` (newest that verifies, under ``root``), ``never``, or a path.
        model: the fields that fix the shapes of this run's weights.
        tokenizer: fingerprint of the tokenizer of this run's data, or ``unknown``.
        otherwise: what to do without this checkpoint, where it does not fit.

    Returns:
        Folder and manifest; None for ``never``, or where ``auto`` finds no checkpoint.

    Raises:
        CheckpointError: the named path is not a sound checkpoint, every one is damaged, or the one
            selected is of another model or tokenizer.
    """
    if resume == "never":
        return None
    if resume == "auto":
        selected = _newest_sound(root)
    else:
        # A link that a user names is the user's; those inside are refused.
        (folder, *_) = run_on_all_ranks(lambda: Path(resume).resolve(), root, _UNREADABLE, _LIST)
        selected = folder, verify_on_all_ranks(folder)
    if selected is not None:
        folder, manifest = selected
        run_on_all_ranks(
            lambda: check_compatible(folder, manifest, model, tokenizer, otherwise),
            folder,
            "does not fit this run",
            "",
        )
    return selected


def _newest_sound(root: Path) -> tuple[Path, Manifest] | None:
    (candidates, *_) = run_on_all_ranks(
        lambda: folders.committed(root) if dist.get_rank() == 0 else [], root, _UNREADABLE, _LIST
    )
    damages: list[CheckpointError] = []
    for folder in candidates:
        try:
            manifest = verify_on_all_ranks(folder)
        except CheckpointError as damage:
            damages.append(damage)
            continue
        for skipped in damages:
            LOGGER.warning("skipped a damaged checkpoint: %s", skipped)
        return folder, manifest
    if candidates:
        raise CheckpointError(
            str(root),
            f"all {len(candidates)} checkpoints are damaged: {damages[0]}",
            "restore one of them, or start again with checkpoint.resume=never",
        )
    return None


def verify_on_all_ranks(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, each rank an even share; collective.

    Rank 0 compares names and sizes. What any rank finds wrong, or cannot read, is raised on all.

    Raises:
        CheckpointError: the first rank's reason, the same on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    manifests: list[Manifest] = []

    def read() -> str:
        manifests.append(read_manifest(folder))
        if rank == 0:
            check_files(folder, manifests[0])
        return json_digest(asdict(manifests[0]))

    digests = run_on_all_ranks(read, folder, _UNREADABLE, _LIST)
    # Shares are cut from the manifest: from different ones they would not make up a whole.
    for other, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                str(folder / NAME),
                f"reads differently on rank {other} and on rank 0",
                "the ranks must share one file system; one that lags may have caught up by now",
            )
    (manifest,) = manifests
    share = rank_share(blocks(manifest.files), rank, world)
    run_on_all_ranks(lambda: check_blocks(folder, share), folder, _UNREADABLE, _LIST)
    return manifest


def check_compatible(
    folder: Path, manifest: Manifest, model: dict[str, Any], tokenizer: str, otherwise: str
) -> None:
    """Refuse a checkpoint of another model or tokenizer, before anything is loaded.

    Raises:
        CheckpointError: names the first field that differs.
    """
    for name in sorted(model.keys() | manifest.model.keys()):
        ours, theirs = model.get(name), manifest.model.get(name)
        if ours != theirs:
            raise CheckpointError(
                str(folder),
                f"is of another model: {name} is {theirs!r} there and {ours!r} here",
                f"{_override(name, theirs)}; {otherwise}",
            )
    if tokenizer != manifest.tokenizer and "unknown" not in (tokenizer, manifest.tokenizer):
        raise CheckpointError(
            str(folder),
            f"was trained with another tokenizer ({manifest.tokenizer[:12]}) than that of the "
            f"data ({tokenizer[:12]})",
            f"prepare the data with the checkpoint's tokenizer; {otherwise}",
        )


def _override(name: str, theirs: Any) -> str:
    """What would make the model the checkpoint's."""
    if name == "padded_vocab":
        return "data of the checkpoint's tokenizer fits it"
    for method in BALANCING.values():
        if name in method.state:
            return f"model.router.balancing={method.name} fits it"
    key = "router.expert_bias" if name == "expert_bias" else name
    return f"model.{key}={str(theirs).lower()} fits it"

"""Read a checkpoint into a model and optimizer of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import optimizer_state, rng
from moe_train.checkpoint.manifest import Manifest, read_manifest
from moe_train.checkpoint.model_state import model_entries, sharded_model_state
from moe_train.checkpoint.reading import OTHER, read_entries
from moe_train.checkpoint.together import together
from moe_train.errors import CheckpointError
from moe_train.features.balancing import BALANCING


def check_fits(folder: Path, model: dict[str, Any], tokenizer: str) -> Manifest:
    """Refuse a checkpoint of another model or tokenizer, before anything is loaded.

    Args:
        model: the fields that fix the shapes of this run's weights.
        tokenizer: fingerprint of the tokenizer of this run's data, or ``unknown``.

    Raises:
        CheckpointError: names the first field that differs.
    """
    manifest = read_manifest(folder)
    for name in sorted(model.keys() | manifest.model.keys()):
        ours, theirs = model.get(name), manifest.model.get(name)
        if ours != theirs:
            raise CheckpointError(
                str(folder),
                f"is of another model: {name} is {theirs!r} there and {ours!r} here",
                f"{_advice(name, theirs)}run.name=NAME starts a new run",
            )
    if tokenizer != manifest.tokenizer and "unknown" not in (tokenizer, manifest.tokenizer):
        raise CheckpointError(
            str(folder),
            f"was trained with another tokenizer ({manifest.tokenizer[:12]}) than that of the "
            f"data ({tokenizer[:12]})",
            "prepare the data with the checkpoint's tokenizer, or start a new run: run.name=NAME",
        )
    return manifest


def _advice(name: str, theirs: Any) -> str:
    """The override that would make the model the checkpoint's, where there is one."""
    if name == "padded_vocab":
        return "data of the checkpoint's tokenizer continues it; "
    for method in BALANCING.values():
        if name in method.state:
            return f"model.router.balancing={method.name} continues it; "
    key = "router.expert_bias" if name == "expert_bias" else name
    return f"model.{key}={str(theirs).lower()} continues it; "


def load_checkpoint(
    folder: Path, manifest: Manifest, *, chunks: list[Any], optimizer: Any | None, layout: str
) -> bool:
    """Load weights, and optimizer and random states when ``optimizer`` is given; collective.

    Args:
        layout: this run's layout tag. Random states belong to one layout: in another one they
            stay as seeded, which the result tells.

    Returns:
        Whether the random states were restored.

    Raises:
        CheckpointError: a tensor is missing, damaged or has another shape; on every rank.
    """
    read_entries(model_entries(chunks, sharded_model_state(chunks)), folder, manifest)
    if optimizer is None:
        return False
    _load_optimizer(folder, manifest, chunks, optimizer)
    return _load_rng(folder, manifest, layout)


def _load_optimizer(folder: Path, manifest: Manifest, chunks: list[Any], optimizer: Any) -> None:
    def prepare() -> None:
        optimizer_state.initialise_state(optimizer)
        missing = set(optimizer_state.state_names(optimizer)) - set(manifest.optimizer_states)
        if missing == {"param"}:
            # Written without master copies: the weights themselves are the master.
            optimizer_state.master_from_model(optimizer)
        elif missing:
            raise CheckpointError(str(folder), f"has no optimizer state {min(missing)}", OTHER)

    together(prepare, folder, "cannot be loaded", OTHER)
    for name in optimizer_state.state_names(optimizer):
        if name in manifest.optimizer_states:
            model_state = sharded_model_state(chunks)
            tree = optimizer_state.state_entries(optimizer, model_state, name)
            read_entries({"optimizer": tree}, folder, manifest)
    optimizer_state.set_optimizer_step(optimizer, manifest.optimizer_step)


def _load_rng(folder: Path, manifest: Manifest, layout: str) -> bool:
    packed, sizes = rng.pack()
    rank, world = dist.get_rank(), dist.get_world_size()
    if (manifest.layout, manifest.world, manifest.rng_sizes) != (layout, world, sizes):
        return False
    read_entries({"rng": rng.entry(packed, rank, world)}, folder, manifest)
    rng.unpack(packed, sizes)
    return True

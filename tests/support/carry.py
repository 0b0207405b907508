"""Checkpoints carried from layout to layout without a step between, to compare bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path


def rewrite(rank: int, world: int, overrides: Sequence[str], source: str, root: str) -> str:
    """Load checkpoint ``source`` in the layout of ``overrides`` and save it under ``root``.

    Every rank of a test world calls it; returns the new checkpoint's folder.
    """
    from moe_train.checkpoint.load import load_checkpoint
    from moe_train.checkpoint.manifest import read_manifest
    from moe_train.checkpoint.save import Save
    from tests.support.engines import open_engine

    manifest = read_manifest(Path(source))
    engine = open_engine(rank, world, overrides, vocab=manifest.model["padded_vocab"])
    modules = [chunk.module for chunk in engine.chunks]
    load_checkpoint(
        Path(source), manifest, chunks=modules, optimizer=engine.optimizer, layout="another"
    )
    own = {"optimizer_step", "optimizer_states", "rng_sizes", "files", "format", "step"}
    fields = {k: v for k, v in dataclasses.asdict(manifest).items() if k not in own}
    save = Save(
        Path(root),
        step=manifest.step,
        chunks=modules,
        optimizer=engine.optimizer,
        fields=fields,
        keep=1,
    )
    return str(save.commit())


def digests(rank: int, world: int, folders: Sequence[str]) -> list[dict[str, str]]:
    """Digest of every global tensor of checkpoints, random states left out; on one rank."""
    import torch
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from moe_train.checkpoint.load import reader
    from moe_train.checkpoint.manifest import read_manifest

    results = []
    for folder in map(Path, folders):
        state: dict[str, torch.Tensor] = {}
        with reader(folder, read_manifest(folder)) as opened:
            _load_state_dict(state, opened, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        results.append(
            {
                key: f"{value.dtype} {hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()}"
                for key, value in sorted(state.items())
                if isinstance(value, torch.Tensor) and key != "rng"
            }
        )
    return results

"""Model chunks of one rank of any world, on fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

from moe_train.backend.groups import open_groups
from moe_train.model import build
from moe_train.model.transformer_config import transformer_config
from moe_train.train import engine as engines

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from moe_train.backend.protocol import Backend
    from moe_train.parallel.resolved import ResolvedRun


def fake_chunks(run: ResolvedRun, backend: Backend) -> list[GPTModel]:
    """This rank's model chunks, uninitialised; call inside ``fake_world``."""
    config, groups = run.config, open_groups(run.layout, timeout_seconds=60)
    with unset_fake_temporarily():
        engines.seed_everything(config.run.seed)
    megatron = transformer_config(config, backend)
    span = engines.build_dispatcher(config, megatron, backend, groups) if run.layout.span else None
    return build.build_chunks(
        config,
        megatron,
        backend,
        groups,
        padded_vocab=run.padded_vocab,
        recomputed=config.recomputed_layers,
        cross_stage=span,
    )


def parameter_count(chunks: list[GPTModel]) -> int:
    """Parameters of a rank, a shared one counted once."""
    distinct: dict[int, Any] = {id(p): p for chunk in chunks for p in chunk.parameters()}
    return sum(parameter.numel() for parameter in distinct.values())

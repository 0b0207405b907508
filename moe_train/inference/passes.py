"""Forward passes of growing sequences through the pipeline stages, with Megatron's KV cache.

Shape letters: B sequences, S tokens of a pass, C hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from moe_train.train.engine import Engine


class Passes:
    """Passes over ``batch`` sequences of equal length; collective over the replica.

    Args:
        engine: built without training and sequence parallelism, one chunk a stage.
        length: most tokens of a sequence.
        cache: keep keys and values, so that a pass needs the new tokens only. Megatron's cache
            masks nothing after the first pass: every later one takes a single token.
    """

    def __init__(self, engine: Engine, batch: int, length: int, *, cache: bool) -> None:
        (self._model,) = engine.chunks
        self._engine, self._pipeline = engine, engine.groups.pp
        self._context = StaticInferenceContext(batch, length) if cache else None
        self._seen = 0

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """Logits after the last of ``tokens_BS``, [B, V] in fp32; None but on the last stage.

        Args:
            tokens_BS: the sequences from their beginning; only what the cache does not have is
                computed.
        """
        fresh_BS = tokens_BS[:, self._seen :]
        assert self._seen == 0 or fresh_BS.size(1) == 1
        positions_BS = torch.arange(self._seen, tokens_BS.size(1), device=fresh_BS.device)
        stage, stages = self._pipeline.rank(), self._pipeline.size()
        if stage > 0:
            self._model.set_input_tensor(self._receive(*fresh_BS.shape))
        with InferenceMode.active():
            output = self._model(
                input_ids=fresh_BS,
                position_ids=positions_BS.expand_as(fresh_BS),
                attention_mask=None,
                inference_context=self._context,
                runtime_gather_output=True,
            )
        if self._context is not None:
            self._seen = tokens_BS.size(1)
            self._context.increment_sequence_len_offset(fresh_BS.size(1))
        if stage < stages - 1:
            dist.send(output.contiguous(), self._neighbour(+1), group=self._pipeline)
            return None
        last_BV: torch.Tensor = output[:, -1].float()
        return last_BV[:, : self._engine.run.vocab]

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """The last stage's ``values``, on every stage."""
        stages = self._pipeline.size()
        if stages > 1:
            last = dist.get_global_rank(self._pipeline, stages - 1)
            dist.broadcast(values, last, group=self._pipeline)
        return values

    def _receive(self, batch: int, length: int) -> torch.Tensor:
        megatron: Any = self._engine.megatron
        shape = (length, batch, megatron.hidden_size)
        received_SBC = torch.empty(
            shape, dtype=megatron.pipeline_dtype, device=self._engine.backend.device
        )
        dist.recv(received_SBC, self._neighbour(-1), group=self._pipeline)
        return received_SBC

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self._pipeline, self._pipeline.rank() + step)

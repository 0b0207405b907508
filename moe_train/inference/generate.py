"""New tokens for prompts: prefill, then a token a pass, under TP, PP, EP and DP.

Prompts of one batch start together after the shortest: until its own end, a longer prompt's tokens
take the place of chosen ones, so that no padding ever enters attention or a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_train.inference.passes import Passes
from moe_train.inference.request import Request
from moe_train.inference.sampling import choose
from moe_train.train.engine import Engine


@dataclass
class Completion:
    """New tokens of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """With the end-of-document token, where it was chosen."""
    margins: list[float] = field(default_factory=list)
    """Difference of the two largest logits at every token: how near a greedy choice was to
    another one."""
    ended: bool = False
    """Whether the end-of-document token was chosen."""


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], request: Request
) -> list[Completion]:
    """Continue ``prompts`` (token ids, none empty); collective over the world.

    The data-parallel replicas share the prompts. A chosen token depends on its own prompt alone,
    up to the rounding of differently shaped products.

    Args:
        engine: see :class:`Passes`.

    Returns:
        The completions in order, the same on every rank.
    """
    data = engine.groups.dp
    whole = data.size() * request.batch
    completions: dict[int, Completion] = {}
    for begin in range(0, len(prompts), whole):
        members = list(range(begin, min(begin + whole, len(prompts))))
        # Every replica makes the same passes: expert groups may reach over several of them.
        share = -(-len(members) // data.size())
        mine = [members[i] if i < len(members) else begin for i in range(data.size() * share)]
        mine = mine[data.rank() * share : (data.rank() + 1) * share]
        bounds = [len(prompts[index]) for index in members]
        batch = _Batch(engine, [prompts[index] for index in mine], mine, request, bounds)
        for index, completion in zip(mine, batch.run(), strict=True):
            completions[index] = completion
    gathered: list[Any] = [None] * data.size()
    dist.all_gather_object(gathered, completions, group=data)
    merged = {index: one for part in gathered for index, one in part.items()}
    return [merged[index] for index in range(len(prompts))]


class _Batch:
    """Prompts that are computed together on this replica.

    Args:
        numbers: of the prompts among all.
        bounds: lengths of the prompts of all replicas.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        request: Request,
        bounds: Sequence[int],
    ) -> None:
        self._engine, self._numbers, self._request = engine, numbers, request
        self._sizes = [len(prompt) for prompt in prompts]
        self._begin, self._end = min(bounds), max(bounds) + request.tokens
        device = engine.backend.device
        self._tokens_BS = torch.zeros(len(prompts), self._end, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self._tokens_BS[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self._passes = Passes(engine, len(prompts), self._end, cache=request.cache)
        self._completions = [Completion() for _ in prompts]

    def run(self) -> list[Completion]:
        for position in range(self._begin, self._end):
            self._take(position, self._next(position))
            if self._all_done():
                break
        return self._completions

    def _next(self, position: int) -> list[list[float]]:
        """Token and margin for each row, the same on every rank of the replica."""
        logits_BV = self._passes.logits(self._tokens_BS[:, :position])
        chosen_2B = torch.zeros(
            2, len(self._sizes), dtype=torch.float64, device=self._tokens_BS.device
        )
        if logits_BV is not None:
            places = [
                (number, position - size)
                for number, size in zip(self._numbers, self._sizes, strict=True)
            ]
            chosen_2B[0] = choose(logits_BV, self._request.sampling, places)
            best_B2 = logits_BV.topk(2).values
            chosen_2B[1] = best_B2[:, 0] - best_B2[:, 1]
        return self._passes.from_last_stage(chosen_2B).tolist()  # type: ignore[no-any-return]

    def _take(self, position: int, chosen: list[list[float]]) -> None:
        for row, (token, margin) in enumerate(zip(*chosen, strict=True)):
            if position < self._sizes[row]:
                continue
            self._tokens_BS[row, position] = int(token)
            completion = self._completions[row]
            if not self._done(row):
                completion.tokens.append(int(token))
                completion.margins.append(margin)
                completion.ended = int(token) == self._request.eod

    def _done(self, row: int) -> bool:
        completion = self._completions[row]
        return completion.ended or len(completion.tokens) >= self._request.tokens

    def _all_done(self) -> bool:
        """Whether every row of every replica is done; without an end that follows from lengths."""
        if self._request.eod is None:
            return False
        left = sum(not self._done(row) for row in range(len(self._sizes)))
        counted = torch.tensor(left, device=self._engine.backend.device)
        dist.all_reduce(counted, group=self._engine.groups.dp)
        return int(counted) == 0

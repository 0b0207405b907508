"""Log-likelihoods of given tokens, in every layout that trains.

Rows go through the pipeline schedule of a validation. Shape letters: B rows of the micro-batch,
S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from moe_train.data.batches import MicroBatch
from moe_train.inference.tasks import Row
from moe_train.train.engine import Engine
from moe_train.train.forward import run_model
from moe_train.train.step import schedule_arguments


@torch.no_grad()
def log_likelihoods(engine: Engine, rows: Iterable[Row]) -> list[float]:
    """Sum of the log-probabilities (nats) of each row's scored tokens; collective.

    Args:
        engine: built without training.
        rows: the same on every rank; at most ``data.sequence`` + 1 tokens each.

    Returns:
        The same on every rank, in the order of ``rows``.
    """
    rows = list(rows)
    assert all(len(row.tokens) <= engine.config.data.sequence + 1 for row in rows)
    data, micro = engine.groups.dp, engine.config.batch.micro
    totals = torch.zeros(len(rows), dtype=torch.float64, device=engine.backend.device)
    # Rows of like length together: a batch is as long as its longest row.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    for begin in range(0, len(rows), engine.run.sequences):
        chosen = order[begin : begin + engine.run.sequences]
        length = _length(engine, max(len(rows[index].tokens) for index in chosen) - 1)
        mine = [
            chosen[start : start + micro]
            for start in range(data.rank() * micro, engine.run.sequences, data.size() * micro)
        ]
        batches = [_collate([rows[index] for index in part], micro, length) for part in mine]
        arguments = schedule_arguments(engine, batches, forward_only=True)
        arguments["forward_step_func"] = partial(_forward, engine.groups, engine.backend.device)
        arguments["seq_length"] = length
        outputs = engine.forward_backward(**arguments)
        if engine.counts_loss:
            for part, output in zip(mine, outputs, strict=True):
                if part:
                    totals[part] = -output["sums"][: len(part)]
    dist.all_reduce(totals)
    return [float(total) for total in totals]


def _length(engine: Engine, longest: int) -> int:
    """Tokens of a batch's rows, which context and tensor parallelism divide."""
    unit = 2 * engine.groups.cp.size() * engine.groups.tp.size()
    return -(-longest // unit) * unit


def _collate(rows: Sequence[Row], micro: int, length: int) -> MicroBatch:
    """The rows, filled up with tokens and with rows that count for nothing."""
    tokens = torch.zeros(micro, length + 1, dtype=torch.int64)
    mask = torch.zeros(micro, length)
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens[index, :size] = torch.tensor(row.tokens)
        mask[index, size - 1 - row.scored : size - 1] = 1.0
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(length).expand(micro, length).contiguous(),
    }


def _forward(
    groups: Any, device: torch.device, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Any, Any]:
    output, batch = run_model(groups, device, batches, model)
    return output, partial(_sums, batch["loss_mask"], groups.cp)


def _sums(
    mask_BS: torch.Tensor, cp_group: Any, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each row's scored tokens; the first value is the schedule's, and unused."""
    sums_B = (loss_BS.double() * mask_BS).sum(dim=1)
    if cp_group.size() > 1:
        sums_B = all_reduce(sums_B, group=cp_group)
    # A copy: the schedule divides the returned loss in place.
    return loss_BS.sum(), {"sums": sums_B.clone()}

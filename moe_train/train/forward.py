"""Forward pass of one micro-batch, as Megatron's schedules call it.

Shape letters: B sequences of the micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch.distributed.nn.functional import all_reduce

from moe_train.data.batches import MicroBatch


def mean_loss(
    mask_BS: torch.Tensor, cp_group: Any, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean token loss of a micro-batch, and its copy for the log.

    Args:
        mask_BS: 1 where a token counts, as the dataset says (``data/datasets.py``:
            ``eod_mask_loss=False``, so every token does, ends of documents included).
        cp_group: ranks that hold parts of the same sequences.
        loss_BS: nats per token.
    """
    mask_BS = mask_BS.to(loss_BS.dtype)
    total = torch.stack([(loss_BS * mask_BS).sum(), mask_BS.sum()])
    if cp_group.size() > 1:
        total = all_reduce(total, group=cp_group)
        # Megatron's schedule multiplies by the context size, as each rank holds a part.
        loss = total[0] / total[1] / cp_group.size()
        return loss, {"loss": (loss.detach() * cp_group.size())}
    loss = total[0] / total[1]
    # A copy: the schedule divides the returned loss in place.
    return loss, {"loss": loss.detach().clone()}


def run_model(
    groups: Any,
    device: torch.device,
    batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, MicroBatch]:
    """Run ``model`` on the next micro-batch; returns its output and this rank's part of the batch.

    Args:
        return_schedule_plan: combined 1F1B asks for the chunk's schedule plan instead of its
            output.
    """
    batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
    if groups.cp.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, False, cp_group=groups.cp)
    run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    output = run(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
    )
    return output, batch


def forward_step(
    groups: Any,
    device: torch.device,
    batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """:func:`run_model`'s output, and the loss function of its micro-batch."""
    output, batch = run_model(groups, device, batches, model, return_schedule_plan)
    return output, partial(mean_loss, batch["loss_mask"], groups.cp)

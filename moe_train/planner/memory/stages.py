"""Peak memory of every pipeline stage: state, activations in flight, and the moment of the peak.

All ranks of a stage need the same amount (with even routing; imbalance is explicit). The moments
follow a stage's busiest micro-batch: its forward pass ends while the activations of `held`
micro-batches are saved; then the loss, and layer by layer the backward pass, which frees
what it has used. The optimizer's update comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_train.features.optimizers import OPTIMIZERS
from moe_train.features.schedules import span_rows_in_flight
from moe_train.parallel.optimizer_state import WIDTH, StateBytes, owned_parameters, state_bytes
from moe_train.parallel.parameters import RankParameters
from moe_train.planner.memory.activations import (
    ENGINE,
    Term,
    embedding_terms,
    expert_terms,
    head_terms,
    routing_terms,
    total,
)
from moe_train.planner.memory.layers import (
    attention_backward,
    begun_terms,
    forward_buffers,
    layer_backward,
    loss_phases,
    owner_terms,
    persistent_buffers,
    recomputed_terms,
    retained_terms,
    saved_terms,
)
from moe_train.planner.plan import Plan

GB = 1e9


class Moment(NamedTuple):
    """A point of the step: its name, bytes saved for backward, and the buffers on top."""

    name: str
    saved: float
    buffers: tuple[Term, ...]

    @property
    def bytes(self) -> float:
        """Bytes beside weights, gradients and optimizer state."""
        return self.saved + total(self.buffers)


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes on each rank of one pipeline stage."""

    stage: int
    held: int
    """Micro-batches (chunks of them, when interleaved) in flight at once."""
    state: StateBytes
    one_microbatch: float
    """Bytes saved for one micro-batch by the whole stage (by one chunk, when interleaved)."""
    hosted: float
    """Bytes that the experts of ``placement=span`` save for all stages."""
    peak: Moment
    moments: tuple[Moment, ...]
    fragmentation: float
    reserved: float
    device: float
    """Bytes of the device."""

    @property
    def activations(self) -> float:
        """Activations and temporary buffers at the peak."""
        return self.peak.bytes

    @property
    def total(self) -> float:
        """Bytes of device memory at the peak, allowances included."""
        return self.allocated + self.fragmentation + self.reserved

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak, without allowances."""
        return self.state.device + self.activations

    @property
    def margin(self) -> float:
        """Bytes of the device that are left; negative where it does not fit."""
        return self.device - self.total

    @property
    def without_optimizer(self) -> float:
        """Weights, gradients and activations alone."""
        return self.allocated - self.state.optimizer


def stage_memory(plan: Plan, stage: int) -> StageMemory:
    """Peak memory of the ranks of pipeline stage `stage` (0-based) of a legal plan."""
    z, config, layout = plan.memory_shapes, plan.config, plan.layout
    parameters = plan.parameters(stage)
    held = plan.schedule.in_flight(plan.pipeline, stage)
    modules, recomputed = config.recompute.modules, config.recomputed_layers
    layers, beside = layout.stage_layers(stage), plan.combined
    saved = [
        total(
            saved_terms(
                plan.layer_shapes(number),
                recomputed=number in recomputed,
                modules=modules,
                combined=beside,
            )
        )
        for number in layers
    ]
    first = stage == 0
    ends = total(embedding_terms(z)) * first / layout.virtual_pipeline
    one = sum(saved) / layout.virtual_pipeline + ends
    owned = 0.0
    if layout.span:
        rows = span_rows_in_flight(plan.pipeline)
        owned = rows * len(layers) * total(owner_terms(z, modules))
    # Combined 1F1B frees a layer of one micro-batch for each that it begins of the next.
    whole = plan.schedule.in_flight(plan.pipeline._replace(delay=0), stage) if beside else held
    moments = (
        *_moments(plan, stage, saved, whole * one + owned, beside=held > whole),
        Moment("optimizer update", 0.0, update_terms(plan, parameters)),
    )
    peak = max(moments, key=lambda moment: moment.bytes)
    state = state_bytes(config, layout, parameters)
    return StageMemory(
        stage=stage,
        held=held,
        state=state,
        one_microbatch=one,
        hosted=owned,
        peak=peak,
        moments=moments,
        fragmentation=(state.device + peak.bytes) * plan.assumptions.fragmentation,
        reserved=config.hardware.outside_gb(layout.world) * GB,
        device=plan.device_bytes,
    )


def _moments(
    plan: Plan, stage: int, saved: list[float], floor: float, *, beside: bool
) -> Iterator[Moment]:
    """Moments of a step that may be its peak.

    Args:
        saved: bytes that each layer of the stage saves.
        floor: bytes saved when the forward pass of the busiest micro-batch ends.
        beside: whether the next micro-batch's forward pass runs beside its backward pass.
    """
    z, layout, modules = plan.memory_shapes, plan.layout, plan.config.recompute.modules
    whole = plan.config.recomputed_layers
    always = [*persistent_buffers(z), *quantized_weights(plan, stage)]
    if layout.pipeline > 1:
        always.append(Term("pipeline messages", 2 * z.N * z.H * z.b, "2 N H b", "P2P"))
    yield Moment("end of the forward pass", floor, (*forward_buffers(z), *always))
    if stage == layout.pipeline - 1:
        head = total(head_terms(z)) * (1 + plan.config.model.mtp_layers)
        for phase in loss_phases(z):
            yield Moment(phase.name, floor + head, (*phase.terms, *always))
    layers = layout.stage_layers(stage)
    chunk = len(layout.stage_layers(stage, layout.virtual_pipeline - 1))
    last = list(zip(layers, saved, strict=True))[len(layers) - chunk :]
    freed, done, gained, ahead = 0.0, 0, 0.0, iter(last)
    # The last chunk runs backward first; its layers free what they saved one after the other.
    for number, size in reversed(last):
        recomputed, z = number in whole, plan.layer_shapes(number)
        again = recomputed_terms(z, recomputed=recomputed, modules=modules)
        alive = [*again, *saved_terms(z, recomputed=recomputed, modules=modules)]
        alive += owner_terms(z, modules) if layout.span else []
        before = retained_terms(z, done)
        other, more = next(ahead)
        begun = begun_terms(plan.layer_shapes(other), modules) if beside else []
        for phase in layer_backward(z, [term.name for term in alive]):
            terms = (*again, *phase.terms, *before, *begun, *always)
            yield Moment(f"backward of layer {number}{phase.name}", floor - freed + gained, terms)
        if beside:
            gained += more
            gone = [*routing_terms(z), *expert_terms(z, act="moe_act" in modules)]
            yield Moment(
                f"backward of layer {number}, attention",
                floor - freed + gained - total(gone),
                (*attention_backward(z), *always),
            )
        freed += size
        done += recomputed and not layout.span


def quantized_weights(plan: Plan, stage: int) -> list[Term]:
    """Copies of the matrices' weights in fp8, kept from one micro-batch to the next.

    Row by row for the forward pass and column by column for the backward pass
    (TransformerEngine's ``get_weight_workspace``; Megatron-Core 0.19 passes
    ``is_first_microbatch``). With ``megatron.ddp.fp8_param_gather`` they take the place of the
    16-bit weights, of the same size.
    """
    if plan.config.dtype != "fp8" or plan.config.megatron.ddp.get("fp8_param_gather"):
        return []
    held = plan.parameters(stage)
    size = 2.0 * (held.attention + held.shared_expert + held.experts)
    return [Term("weights in fp8", size, "2 x parameters of attention and experts", ENGINE)]


SCRATCH_BYTES = 128 << 20
"""Bytes that torch's kernels copy at once; TorchAdam's own constant, checked by a test."""


def update_terms(plan: Plan, held: RankParameters) -> tuple[Term, ...]:
    """Buffers of the optimizer step on a rank that holds `held`.

    Gradients that are not fp32 are copied whole for an optimizer that takes fp32 alone
    (Megatron-Core 0.19, ``_copy_model_grads_to_main_grads``); the precision-aware one reads them
    as they are, and torch's kernels copy them with 16-bit moments in parts. TransformerEngine's
    copies nothing.
    """
    optim = plan.config.optim
    owned = owned_parameters(plan.config, plan.layout, held)
    gradient = WIDTH[optim.grad_dtype] < 4
    if not optim.precision_aware:
        if not gradient:
            return ()
        return (
            Term(
                "fp32 copies of gradients", 4.0 * owned,
                "4 x parameters of this rank's share", "Megatron-Core 0.19, optimizer",
            ),
        )  # fmt: skip
    states = len(OPTIMIZERS[optim.name].state_names)
    copied = 4 * (gradient + states * (WIDTH[optim.moment_dtype] < 4))
    if plan.assumptions.fused or not copied:
        return ()
    return (
        Term(
            "parts copied to fp32", float(min(SCRATCH_BYTES, copied * owned)),
            f"128 MiB, or {copied} x parameters if less", "TorchAdam",
        ),
    )  # fmt: skip


def plan_memory(plan: Plan) -> list[StageMemory]:
    """Peak memory of every stage of a legal plan."""
    return [stage_memory(plan, stage) for stage in range(plan.layout.pipeline)]


def worst(stages: Sequence[StageMemory]) -> StageMemory:
    """The stage that needs most."""
    return max(stages, key=lambda one: one.total)

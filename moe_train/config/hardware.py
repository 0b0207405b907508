"""Hardware: the profile that a plan is computed for, and the devices that a run has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.types import (
    Bool,
    Fraction,
    NonNegativeInteger,
    NonNegativeNumber,
    PositiveInteger,
    PositiveNumber,
    Text,
)


@dataclass(frozen=True)
class HardwareConfig:
    """A hardware profile, data only. Every number has a source or says assumed."""

    name: Text = "cpu"
    """Profile name."""
    kind: Literal["cpu", "accelerator"] = "cpu"
    """cpu | accelerator. A plan that does not fit an accelerator's memory is refused."""
    devices_per_node: PositiveInteger = 8
    """Devices that share a node's fast links."""
    memory_gb: PositiveNumber = 24.0
    """Memory of one device in GB (1e9 bytes)."""
    reserved_gb: NonNegativeNumber = 0.0
    """Memory that the driver, its context and communication buffers take, in GB."""
    peak_tflops: dict[Text, PositiveNumber] = field(default_factory=dict)
    """Dense peak per dtype (fp32, bf16, fp8) in TFLOP/s."""
    memory_gbps: NonNegativeNumber = 0.0
    """Device memory bandwidth in GB/s."""
    intra_node_gbps: NonNegativeNumber = 0.0
    """Bandwidth between two devices of a node, one direction, GB/s."""
    inter_node_gbps: NonNegativeNumber = 0.0
    """Bandwidth per device between nodes, one direction, GB/s."""
    gemm_efficiency: Fraction = 0.7
    """Share of the peak that large matrix products reach, 0 to 1."""
    grouped_efficiency: Fraction = 0.6
    """The same for grouped expert products."""
    attention_efficiency: Fraction = 0.5
    """The same for fused attention; with ``attention_exp_gops``, of its products alone."""
    attention_exp_gops: NonNegativeNumber = 0.0
    """Exponentials per second (1e9) of fused attention's softmax, one after the other with its
    products; 0: part of attention_efficiency."""
    memory_efficiency: Fraction = 0.8
    """Share of the memory bandwidth that elementwise kernels reach."""
    link_efficiency: Fraction = 0.8
    """Share of a link's bandwidth that a collective reaches."""
    latency_us: NonNegativeNumber = 15.0
    """Time that a collective takes however small it is, in microseconds."""
    message_us: NonNegativeNumber = 0.0
    """Time that a collective takes for each of its turns, in microseconds: n - 1 turns among n
    ranks, twice as many for an all-reduce."""
    layer_overhead_us: NonNegativeNumber = 0.0
    """Time of a layer's forward pass that is neither arithmetic nor traffic (launches), in
    microseconds; a backward pass has it twice."""
    expert_overhead_us: NonNegativeNumber = 0.0
    """The same for each expert that a rank runs, in microseconds."""
    microbatch_overhead_us: NonNegativeNumber = 0.0
    """Time of a micro-batch's both passes outside the layers that is launches, in microseconds."""
    collective_work: Annotated[NonNegativeNumber, Field(le=1)] = 0.0
    """Share of a collective's time in which it keeps a core busy, 0 to 1; the rest is waiting, in
    which another rank on that core computes. Counts where ranks are more than ``cores``."""
    cores: NonNegativeInteger = 0
    """Cores that all ranks share, each with one thread; 0: every rank has a device of its own."""
    devices: list[Text] = field(default_factory=list)
    """Regular expressions of the whole names that drivers give devices with this profile."""
    device: Text = ""
    """Name of the devices of this run, where the profile was chosen by it."""
    peak_known: Bool = True
    """Whether peak_tflops is the device's: without it a run has no MFU."""
    sources: dict[Text, Text] = field(default_factory=dict)
    """Where each number comes from, or the word assumed."""


@dataclass(frozen=True)
class MachineFacts:
    """The devices of a run, the same on all ranks."""

    kind: str
    """cpu or gpu."""
    count: int
    """Ranks; with GPUs each has one of its own."""
    memory_gb: float
    """Memory of the smallest device in GB (1e9 bytes); 0 on a CPU."""
    kinds: tuple[tuple[str, float], ...] = ()
    """Driver's name of each kind of device, and the memory of the smallest one in GB."""
    per_node: int = 0
    """Ranks on the fullest node; 0 where it is not known."""
    notes: tuple[str, ...] = ()
    """Warnings about the choice of a profile."""

    @property
    def device(self) -> str:
        """Names of all kinds; empty where the driver gives none."""
        return ", ".join(name for name, _ in self.kinds if name)

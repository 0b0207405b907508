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

CONTEXT_GB = 1.5
"""The part of ``reserved_gb`` that a single rank has as well: the driver's context and kernels'
workspaces. Assumed."""


@dataclass(frozen=True)
class HardwareConfig:
    """A hardware profile. Every number has an entry in `sources`."""

    name: Text = "cpu"
    """Profile name."""
    kind: Literal["cpu", "accelerator"] = "cpu"
    """A plan that does not fit an accelerator's memory is refused."""
    devices_per_node: PositiveInteger = 8
    """Devices that share a node's fast links."""
    memory_gb: PositiveNumber = 24.0
    """Memory of one device in GB (1e9 bytes)."""
    reserved_gb: NonNegativeNumber = 0.0
    """Memory outside of tensors in a run of several ranks, in GB: driver context, kernels'
    workspaces, communicators."""
    peak_tflops: dict[Text, PositiveNumber] = field(default_factory=dict)
    """Dense peak per dtype (fp32, bf16, fp8) in TFLOP/s."""
    memory_gbps: NonNegativeNumber = 0.0
    """Device memory bandwidth in GB/s."""
    intra_node_gbps: NonNegativeNumber = 0.0
    """Bandwidth between two devices of a node, one direction, GB/s."""
    paired_links: Bool = False
    """Whether each pair of a node's devices has a link of intra_node_gbps of its own, so that a
    device sends to all others at once; otherwise a device sends that much in all, by a switch."""
    fast_domain: NonNegativeInteger = 0
    """Devices that share fast links where that is more than a node's (NVLink over nodes); 0:
    devices_per_node."""
    inter_node_gbps: NonNegativeNumber = 0.0
    """Bandwidth per device between nodes, one direction, GB/s."""
    intra_message_kb: NonNegativeNumber = 0.0
    """Message to one peer of a node that reaches half of the links' bandwidth, in kB."""
    inter_message_kb: NonNegativeNumber = 0.0
    """The same between nodes."""
    gemm_efficiency: Fraction = 0.7
    """Share of peak_tflops that large matrix products reach."""
    grouped_efficiency: Fraction = 0.6
    """The same for grouped expert products of many rows an expert."""
    tile_rows: NonNegativeInteger = 0
    """Rows of a tile of grouped products: each expert's last tile is half empty on average; 0: no
    loss with few rows."""
    attention_efficiency: Fraction = 0.5
    """The same for fused attention; with ``attention_exp_gops``, of its products alone."""
    attention_exp_gops: NonNegativeNumber = 0.0
    """Exponentials per second (1e9) of fused attention's softmax, not overlapped
    with its products; 0: included in attention_efficiency."""
    memory_efficiency: Fraction = 0.8
    """Share of the memory bandwidth that elementwise kernels reach."""
    link_efficiency: Fraction = 0.8
    """Share of a link's bandwidth that a collective reaches."""
    latency_us: NonNegativeNumber = 15.0
    """Latency of a collective in microseconds."""
    message_us: NonNegativeNumber = 0.0
    """Latency of each step of a ring collective in microseconds: n - 1 steps on n ranks, twice as
    many for an all-reduce."""
    launch_us: NonNegativeNumber = 0.0
    """Time of the host to start one kernel in microseconds; a layer takes the longer of its kernels
    and of their launches. 0: launches take the device's own time (layer_overhead_us)."""
    overlap_share: Annotated[NonNegativeNumber, Field(lt=1)] = 0.0
    """Share of a device's multiprocessors that communication takes while it overlaps with
    compute."""
    layer_overhead_us: NonNegativeNumber = 0.0
    """Overhead of kernel launches in a layer's forward pass in microseconds; a backward pass has it
    twice."""
    expert_overhead_us: NonNegativeNumber = 0.0
    """The same for each expert of a rank, in microseconds."""
    microbatch_overhead_us: NonNegativeNumber = 0.0
    """The same for both passes of a micro-batch outside the layers, in microseconds."""
    collective_work: Annotated[NonNegativeNumber, Field(le=1)] = 0.0
    """Share of a collective's time that occupies a core; in the rest another rank on that core
    computes. Used where there are more ranks than ``cores``."""
    cores: NonNegativeInteger = 0
    """CPU cores shared by all ranks, one thread each; 0: every rank has its own device."""
    devices: list[Text] = field(default_factory=list)
    """Regular expressions that match the driver's full name of devices with this profile."""
    device: Text = ""
    """Driver's name of this run's devices where it chose the profile."""
    peak_known: Bool = True
    """Whether peak_tflops is known for the device; otherwise no MFU is reported."""
    sources: dict[Text, Text] = field(default_factory=dict)
    """Source of each number, or \"assumed\"."""

    def outside_gb(self, world: int) -> float:
        """Memory outside of tensors on each of `world` ranks, in GB."""
        return self.reserved_gb if world > 1 else min(self.reserved_gb, CONTEXT_GB)

    @property
    def fast_devices(self) -> int:
        """Consecutive ranks that fast links join."""
        return self.fast_domain or self.devices_per_node


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

"""Environment variables that a run on CUDA sets, with their rules.

CUDA, NCCL and torch's allocator read them once, when they start: they are set before the first
use of a GPU (:mod:`moe_train.backend.cuda.environment`). docs/environment.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.config.schema import value_at, with_values
from moe_train.config.training import BackendConfig

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
LAZY = ("TORCH_DIST_USE_NCCL2", "0")
"""Set where the environment does not: torch 2.15's newer NCCL backend creates a communicator with
every group, the one before it with a group's first collective."""
ORDER = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
"""Set where the environment does not: the order of nvidia-smi, from which the device is chosen."""
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch 2.9's CUDA allocator reads the second alone, and its general settings warn that the name is
old unless the first is set too; from 2.10 either is read. Both together suit all versions."""
EXPANDABLE = "expandable_segments:True"
MANY = 32
"""Hardware queues where the expert exchange overlaps; the most that CUDA has."""


@dataclass(frozen=True)
class Variable:
    """One variable of a run's environment."""

    name: str
    value: str | None
    """None: not set by moe_train."""
    key: str
    """Config key that sets it; empty where there is none."""
    why: str


def connections_rule(config: Config) -> tuple[int | None, str]:
    """CUDA_DEVICE_MAX_CONNECTIONS for a resolved config, and why; None leaves CUDA's own 8.

    Megatron-Core wants 1 under tensor or context parallelism, so that a collective launched before
    a product is also queued before it (its training arguments refuse anything else before
    Blackwell), and more than 1 where the expert exchange overlaps (its MoE README). With both it
    leaves the choice open; 32 serves the overlap, which the user enabled.
    """
    parallel = config.parallel
    ignored = "; Blackwell ignores it"
    if parallel.overlap_expert_comm and (parallel.expert or 1) > 1:
        return (
            MANY,
            f"the expert exchange overlaps, on streams that need queues of their own{ignored}",
        )
    split = [name for name in ("tensor", "context") if (getattr(parallel, name) or 1) > 1]
    if split:
        return 1, f"{' and '.join(split)} parallelism: collectives start in launch order{ignored}"
    return None, "no collective relies on launch order: CUDA's own default"


def segments_rule(config: Config) -> tuple[bool, str]:
    """Whether torch's allocator uses expandable segments, and why."""
    if config.megatron.ddp.get("nccl_ub"):
        return False, "NCCL user buffers use a memory pool, which has fixed segments"
    graphs = config.megatron.transformer
    if graphs.get("cuda_graph_impl", "none") != "none" or any(
        graphs.get(name) for name in ("enable_cuda_graph", "external_cuda_graph")
    ):
        return False, "CUDA graphs would need NCCL_GRAPH_REGISTER=0 with them"
    return True, "activation sizes vary with routing, which fragments fixed segments"


RULES = {
    "backend.cuda_device_max_connections": connections_rule,
    "backend.expandable_segments": segments_rule,
}


def apply_rules(config: Config) -> Config:
    """A copy of a resolved config with the rules' values for settings that are null."""
    open_keys = [key for key in RULES if value_at(config, key) is None]
    return with_values(config, {key: RULES[key](config)[0] for key in open_keys})


def nccl_name(key: str) -> str:
    """The variable of a key of ``backend.nccl``, such as ``NVLS_ENABLE``."""
    return f"NCCL_{key.upper().removeprefix('NCCL_')}"


def settings(backend: BackendConfig) -> list[tuple[str, str, str]]:
    """Name, value and config key of each variable that the config sets, in a fixed order."""
    queues, segments = "backend.cuda_device_max_connections", "backend.expandable_segments"
    connections = backend.cuda_device_max_connections
    return [
        *([(CONNECTIONS, str(connections), queues)] if connections is not None else []),
        *((name, EXPANDABLE, segments) for name in ALLOCATORS if backend.expandable_segments),
        *((nccl_name(k), str(v), f"backend.nccl.{k}") for k, v in backend.nccl.items()),
    ]


def variables(config: Config) -> list[Variable]:
    """Every variable with a rule or a key, its value under the config, and the reason."""
    backend = config.backend
    set_ = {name: value for name, value, _ in settings(backend)}
    queues, why_queues = connections_rule(config)
    segments, why_segments = segments_rule(config)
    if backend.cuda_device_max_connections != queues:
        why_queues = f"set in the config; by rule {queues or 'unset'}: {why_queues}"
    if backend.expandable_segments != segments:
        why_segments = f"set in the config; by rule {'on' if segments else 'off'}: {why_segments}"
    return [
        Variable(
            CONNECTIONS, set_.get(CONNECTIONS), "backend.cuda_device_max_connections", why_queues
        ),
        *(
            Variable(name, set_.get(name), "backend.expandable_segments", why_segments)
            for name in ALLOCATORS
        ),
        Variable(*ORDER, "", "the order of nvidia-smi; a value in the environment wins"),
        Variable(*LAZY, "", "no communicator for unused groups; a value in the environment wins"),
        *(
            Variable(nccl_name(key), str(value), f"backend.nccl.{key}", "set in the config")
            for key, value in backend.nccl.items()
        ),
    ]

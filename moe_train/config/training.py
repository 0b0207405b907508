"""How the run goes: data, optimizer, loop, checkpoints, logs, machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.types import (
    Bool,
    GradientDtype,
    NonNegativeInteger,
    NonNegativeNumber,
    OptimizerName,
    PositiveInteger,
    PositiveNumber,
    Text,
    Tokens,
)


@dataclass(frozen=True)
class RunConfig:
    """Identity of a run; its folder is ``<dir>/<name>``."""

    name: Text | None = None
    """Folder name; None derives it from experiment and layout."""
    dir: Text = "runs"
    """Parent folder of all runs."""
    seed: NonNegativeInteger = 1234
    """Seed of weights, data order and dropout, whatever the layout."""


@dataclass(frozen=True)
class DataConfig:
    """Tokens: prepared Megatron indexed datasets, blended and packed."""

    train: list[Text] = field(default_factory=list)
    """Prepared dataset prefixes, each `path` or `weight:path`; empty is the embedded corpus."""
    valid: list[Text] = field(default_factory=list)
    """Prepared prefixes for validation; empty takes the split's second part of `train`."""
    tokenizer: Text | None = None
    """Tokenizer: byte, or a tokenizer.json file; None takes what the data was prepared with."""
    sequence: Tokens = 128
    """Tokens per training sequence."""
    split: Text = "98,2,0"
    """Train, valid and test shares when `valid` is empty."""
    cache: Text | None = None
    """Folder of prepared corpora and index caches; None is the user's cache folder."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = "adamw"
    """Optimizer: adamw | adam (L2 regularisation) | sgd (with momentum)."""
    lr: NonNegativeNumber = 3e-3
    """Peak learning rate."""
    embedding_lr: NonNegativeNumber | None = None
    """Peak learning rate of embedding and output head (Megatron's decoupled_lr); None is lr."""
    min_lr: NonNegativeNumber = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay shape: cosine | linear | wsd | constant."""
    warmup_steps: NonNegativeInteger = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInteger | None = None
    """Step at which min_lr is reached; None is train.steps."""
    wsd_decay_steps: PositiveInteger | None = None
    """Length of WSD's final decay; None is a tenth of decay_steps."""
    weight_decay: NonNegativeNumber = 0.1
    """Weight decay on matrices (norms, biases: none)."""
    beta1: Annotated[NonNegativeNumber, Field(lt=1)] = 0.9
    """Adam's first-moment decay."""
    beta2: Annotated[NonNegativeNumber, Field(lt=1)] = 0.95
    """Adam's second-moment decay."""
    eps: PositiveNumber = 1e-8
    """Adam's epsilon."""
    momentum: Annotated[NonNegativeNumber, Field(lt=1)] = 0.9
    """Momentum of sgd."""
    clip: NonNegativeNumber = 1.0
    """Global gradient-norm clip; 0 switches it off."""
    distributed: Bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    precision_aware: Bool = False
    """Keep moments in `moment_dtype` and gradients in `dtype` (needs distributed)."""
    moment_dtype: GradientDtype = "fp32"
    """Dtype of Adam's moments when precision_aware: fp32 | bf16."""
    grad_dtype: GradientDtype = "fp32"
    """Dtype in which gradients are accumulated and reduced: fp32 | bf16."""
    offload: Bool = False
    """Keep optimizer state and its step on the host CPU (CUDA only)."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: PositiveInteger = 100
    """Optimizer steps."""
    eval_every: NonNegativeInteger = 0
    """Validate every so many steps, and at the end; 0 switches validation off."""
    eval_batches: PositiveInteger = 4
    """Global batches per validation."""
    log_every: PositiveInteger = 1
    """Console line every so many steps (metrics.jsonl has every step)."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """On a non-finite loss or gradient: stop | skip (leave the update out) | rollback (to the
    last checkpoint). No such step ever changes a weight."""
    non_finite_limit: NonNegativeInteger = 3
    """Steps that may be skipped or rolled back in one start of the run; one more stops it."""
    trace: Bool = False
    """Write the second step after a start to the run folder's trace.json, for Perfetto."""
    profile_steps: NonNegativeInteger = 0
    """Profile so many steps, from the third after a start on, with torch.profiler: one file a rank
    in the run folder's logs, for Perfetto."""
    gc_every: NonNegativeInteger = 50
    """Run Python's garbage collector after every so many steps, on all ranks at once; 0 leaves it
    to Python, which pauses each rank at a time of its own."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run can be taken up again."""

    every: NonNegativeInteger = 0
    """Save every so many steps, and at the end; 0 switches saving off."""
    keep: PositiveInteger = 2
    """Committed checkpoints kept; older ones are deleted."""
    resume: Text = "auto"
    """auto (newest in the run folder) | never | PATH of a checkpoint."""
    asynchronous: Bool = False
    """Write beside the training that goes on, from a copy of the state in host memory. A
    checkpoint still counts only when it is whole and on the disk; the last one is waited for."""


@dataclass(frozen=True)
class LogConfig:
    """Who hears about the run; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto (online with a key, else offline) | online | offline | disabled."""
    wandb_project: Text = "moe_train"
    """Weights & Biases project."""
    console: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress: auto (bar on a terminal, else lines) | bar | lines | none."""


GroupName = Literal[
    "tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "tp_cp", "tp_dp", "tp_dp_cp",
    "ep", "ep_tp", "ep_dp", "tp_ep_mp", "tp_ep_pp",
]  # fmt: skip
"""Groups by their names in Megatron's ``initialize_model_parallel``; with ``placement=span``
tokens are exchanged in ``mp``."""


@dataclass(frozen=True)
class NcclGroup:
    """NCCL's settings of one group's communicator; what is null is NCCL's own choice."""

    min_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Fewest thread blocks of a collective's kernel."""
    max_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Most thread blocks: fewer leave more of the GPU to computing that overlaps."""
    cga_cluster_size: Annotated[NonNegativeInteger, Field(le=8)] | None = None
    """Thread blocks in a cluster, 0 to 8 (Hopper and later)."""
    net_name: Literal["IB", "socket"] | None = None
    """IB | socket."""
    is_high_priority_stream: Bool = False
    """Run on a stream that the GPU prefers."""


@dataclass(frozen=True)
class BackendConfig:
    """The machine's kernels, communication and threads."""

    kernels: Literal["auto", "te", "torch"] = "auto"
    """Kernels on GPUs: auto (TransformerEngine's where it imports, else torch's) | te | torch.
    A CPU has torch's alone."""
    compile: Bool | None = None
    """Let Megatron compile its small functions with torch.compile, which needs Triton and a C
    compiler on every node; None is as Megatron ships it with te, and off with torch."""

    timeout_seconds: PositiveInteger = 600
    """A step, validation or save that takes longer counts as hung: its rank writes its stacks to
    logs/, names who is to blame and ends with exit code 6."""
    cpu_threads: PositiveInteger = 1
    """Threads of a rank that runs on a CPU; 1 is bitwise reproducible."""
    cuda_device_max_connections: PositiveInteger | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS; null is by rule: 32 where the expert exchange overlaps, else 1
    under tensor or context parallelism, else unset."""
    expandable_segments: Bool | None = None
    """Let torch's allocator grow its segments (PYTORCH_ALLOC_CONF); null is by rule: on, except
    with NCCL user buffers or CUDA graphs. A setting that the environment has is kept."""
    nccl: dict[Text, Text] = field(default_factory=dict)
    """NCCL_* environment settings by their short name, e.g. {IB_QPS_PER_CONNECTION: 2}."""
    nccl_groups: dict[GroupName, NcclGroup] = field(default_factory=dict)
    """NCCL's settings of single process groups, e.g. {ep: {max_ctas: 16}}; on CUDA."""

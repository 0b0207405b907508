"""Config groups of a run: data, optimizer, training loop, checkpoints, logs, backend."""

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
    """Folder name; null derives it from experiment and layout."""
    dir: Text = "runs"
    """Parent folder of all runs."""
    seed: NonNegativeInteger = 1234
    """Seed of initial weights and data order, in any layout."""


@dataclass(frozen=True)
class DataConfig:
    """Tokens: prepared Megatron indexed datasets, blended and packed."""

    train: list[Text] = field(default_factory=list)
    """Prepared dataset prefixes, each `path` or `weight:path`; empty is the embedded corpus."""
    valid: list[Text] = field(default_factory=list)
    """Prepared prefixes for validation; empty is the second share of data.split."""
    tokenizer: Text | None = None
    """Tokenizer: byte, or a tokenizer.json file; null is that of the prepared data."""
    sequence: Tokens = 128
    """Tokens per training sequence."""
    split: Text = "98,2,0"
    """Shares of data.train for training, validation and test where data.valid is empty."""
    cache: Text | None = None
    """Folder of prepared corpora and index caches; null is the user's cache folder."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = "adamw"
    """Optimizer: adamw | adam (L2 regularisation) | sgd (with momentum)."""
    lr: NonNegativeNumber = 3e-3
    """Peak learning rate."""
    embedding_lr: NonNegativeNumber | None = None
    """Peak learning rate of embedding and output head (Megatron's decoupled_lr); null is lr."""
    min_lr: NonNegativeNumber = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the decay; wsd is warm-up, stable, decay."""
    warmup_steps: NonNegativeInteger = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInteger | None = None
    """Step at which min_lr is reached; null is train.steps."""
    wsd_decay_steps: PositiveInteger | None = None
    """Steps of WSD's final decay; null is a tenth of decay_steps."""
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
    """Megatron's precision-aware optimizer: moments in moment_dtype, gradients in grad_dtype (needs
    distributed)."""
    moment_dtype: GradientDtype = "fp32"
    """Dtype of Adam's moments with precision_aware."""
    grad_dtype: GradientDtype = "fp32"
    """Dtype in which gradients are accumulated and reduced."""
    offload: Bool = False
    """Keep optimizer state and its step on the host CPU (CUDA only)."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: PositiveInteger = 100
    """Optimizer steps."""
    eval_every: NonNegativeInteger = 0
    """Steps between validations, with one at the end; 0 switches validation off."""
    eval_batches: PositiveInteger = 4
    """Global batches per validation."""
    log_every: PositiveInteger = 1
    """Steps between console lines (metrics.jsonl has every step)."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """On a non-finite loss or gradient norm: stop, skip the update, or roll back to the last
    checkpoint. Such a step never changes a weight."""
    non_finite_limit: NonNegativeInteger = 3
    """Steps that may be skipped or rolled back between two starts; one more stops the run."""
    trace: Bool = False
    """Trace the second step after a start to trace.json in the run folder, for Perfetto."""
    profile_steps: NonNegativeInteger = 0
    """Steps to profile with torch.profiler, from the third after a start: one file per rank in
    logs/, for Perfetto."""
    gc_every: NonNegativeInteger = 50
    """Steps between runs of Python's garbage collector, on all ranks at once; 0 leaves it to
    Python, which then pauses each rank at a different time."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: NonNegativeInteger = 0
    """Steps between checkpoints, with one at the end; 0 switches saving off."""
    keep: PositiveInteger = 2
    """Committed checkpoints kept; older ones are deleted."""
    resume: Text = "auto"
    """auto (newest checkpoint of the run folder) | never | PATH of a checkpoint: continue it, with
    its optimizer, learning-rate schedule and place in the data."""
    init: Text | None = None
    """PATH of a run folder, checkpoint or Hugging Face folder whose weights a new run starts with;
    optimizer, schedule and data begin at zero. Unused where the run resumes."""
    asynchronous: Bool = False
    """Write in the background, from a copy of the state in host memory. A checkpoint counts only
    once it is complete and on disk; the end of the run waits for the last one."""


@dataclass(frozen=True)
class LogConfig:
    """Console and Weights & Biases; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online with an API key, else offline."""
    wandb_project: Text = "moe_train"
    """Weights & Biases project."""
    console: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress; auto is a bar on a terminal, else lines."""


GroupName = Literal[
    "tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "tp_cp", "tp_dp", "tp_dp_cp",
    "ep", "ep_tp", "ep_dp", "tp_ep_mp", "tp_ep_pp",
]  # fmt: skip
"""Groups by their names in Megatron's ``initialize_model_parallel``; with ``placement=span``
tokens are exchanged in ``mp``."""


@dataclass(frozen=True)
class NcclGroup:
    """NCCL settings of the communicator of one process group; null leaves the choice to NCCL."""

    min_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Minimum of thread blocks of a collective's kernel."""
    max_ctas: Annotated[PositiveInteger, Field(le=64)] | None = None
    """Maximum of thread blocks: fewer leave more of the GPU to overlapping computation."""
    cga_cluster_size: Annotated[NonNegativeInteger, Field(le=8)] | None = None
    """Thread blocks of a cluster (Hopper and later)."""
    net_name: Literal["IB", "socket"] | None = None
    """Network plugin."""
    is_high_priority_stream: Bool = False
    """Run on a high-priority CUDA stream."""


@dataclass(frozen=True)
class BackendConfig:
    """Kernels, communication and threads."""

    kernels: Literal["auto", "te", "torch"] = "auto"
    """Kernels on GPUs; auto is TransformerEngine's where it imports, else torch's. CPUs always use
    torch's."""
    compile: Bool | None = None
    """Let Megatron compile its small functions with torch.compile, which needs Triton and a C
    compiler on every node; null is Megatron's default with te, and off with torch."""

    timeout_seconds: PositiveInteger = 600
    """A step, validation or save that takes longer counts as hung: the rank writes its stacks to
    logs/, names the ranks that it waits for and exits with code 6. A single collective waits twice
    as long (collective_seconds)."""
    cpu_threads: PositiveInteger = 1
    """Threads of a rank that runs on a CPU; 1 is bitwise reproducible."""
    cuda_device_max_connections: PositiveInteger | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS; null follows a rule: 32 where the expert exchange
    overlaps, else 1 under tensor or context parallelism, else unset."""
    expandable_segments: Bool | None = None
    """Let torch's allocator grow its segments (PYTORCH_ALLOC_CONF); null follows a rule: on, except
    with NCCL user buffers or CUDA graphs. A value in the environment wins."""
    nccl: dict[Text, Text] = field(default_factory=dict)
    """NCCL_* environment variables without the prefix, e.g. {IB_QPS_PER_CONNECTION: 2}."""
    nccl_groups: dict[GroupName, NcclGroup] = field(default_factory=dict)
    """NCCL settings by process group, e.g. {ep: {max_ctas: 16}}."""

    @property
    def collective_seconds(self) -> int:
        """Timeout of a collective, and of the meeting of all ranks at the start.

        Longer than the watchdog's, which names the lost rank: a collective's timeout does not.
        """
        return 2 * self.timeout_seconds

"""How the run goes: data, optimizer, loop, checkpoints, logs, machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_train.config.nccl import NcclGroup


@dataclass
class RunConfig:
    """Identity of a run; its folder is ``<dir>/<name>``."""

    name: str | None = None
    """Folder name; None derives it from experiment and layout."""
    dir: str = "runs"
    """Parent folder of all runs."""
    seed: int = 1234
    """Seed of weights, data order and dropout, whatever the layout."""


@dataclass
class DataConfig:
    """Tokens: prepared Megatron indexed datasets, blended and packed."""

    train: list[str] = field(default_factory=list)
    """Prepared dataset prefixes, each `path` or `weight:path`; empty is the embedded corpus."""
    valid: list[str] = field(default_factory=list)
    """Prepared prefixes for validation; empty takes the split's second part of `train`."""
    tokenizer: str | None = None
    """Tokenizer: byte, or a tokenizer.json file; None takes what the data was prepared with."""
    sequence: int = 128
    """Tokens per training sequence."""
    split: str = "98,2,0"
    """Train, valid and test shares when `valid` is empty."""
    cache: str | None = None
    """Folder of prepared corpora and index caches; None is the user's cache folder."""


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """Optimizer: adamw | adam (L2 regularisation) | sgd (with momentum)."""
    lr: float = 3e-3
    """Peak learning rate."""
    embedding_lr: float | None = None
    """Peak learning rate of embedding and output head (Megatron's decoupled_lr); None is lr."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: str = "cosine"
    """Decay shape: cosine | linear | wsd | constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Step at which min_lr is reached; None is train.steps."""
    wsd_decay_steps: int | None = None
    """Length of WSD's final decay; None is a tenth of decay_steps."""
    weight_decay: float = 0.1
    """Weight decay on matrices (norms, biases: none)."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.9
    """Momentum of sgd."""
    clip: float = 1.0
    """Global gradient-norm clip; 0 switches it off."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    precision_aware: bool = False
    """Keep moments in `moment_dtype` and gradients in `dtype` (needs distributed)."""
    moment_dtype: str = "fp32"
    """Dtype of Adam's moments when precision_aware: fp32 | bf16."""
    grad_dtype: str = "fp32"
    """Dtype in which gradients are accumulated and reduced: fp32 | bf16."""
    offload: bool = False
    """Keep optimizer state and its step on the host CPU (CUDA only)."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 100
    """Optimizer steps."""
    eval_every: int = 0
    """Validate every so many steps, and at the end; 0 switches validation off."""
    eval_batches: int = 4
    """Global batches per validation."""
    log_every: int = 1
    """Console line every so many steps (metrics.jsonl has every step)."""
    non_finite: str = "stop"
    """On a non-finite loss or gradient: stop | skip (leave the update out) | rollback (to the
    last checkpoint). No such step ever changes a weight."""
    non_finite_limit: int = 3
    """Steps that may be skipped or rolled back in one start of the run; one more stops it."""
    trace: bool = False
    """Write the second step after a start to the run folder's trace.json, for Perfetto."""
    gc_every: int = 50
    """Run Python's garbage collector after every so many steps, on all ranks at once; 0 leaves it
    to Python, which pauses each rank at a time of its own."""


@dataclass
class CheckpointConfig:
    """Where the run can be taken up again."""

    every: int = 0
    """Save every so many steps, and at the end; 0 switches saving off."""
    keep: int = 2
    """Committed checkpoints kept; older ones are deleted."""
    resume: str = "auto"
    """auto (newest in the run folder) | never | PATH of a checkpoint."""
    asynchronous: bool = False
    """Write beside the training that goes on, from a copy of the state in host memory. A
    checkpoint still counts only when it is whole and on the disk; the last one is waited for."""


@dataclass
class LogConfig:
    """Who hears about the run; metrics.jsonl is always written."""

    wandb: str = "auto"
    """Weights & Biases: auto (online with a key, else offline) | online | offline | disabled."""
    wandb_project: str = "moe_train"
    """Weights & Biases project."""
    console: str = "auto"
    """Progress: auto (bar on a terminal, else lines) | bar | lines | none."""


@dataclass
class BackendConfig:
    """The machine's kernels, communication and threads."""

    kernels: str = "auto"
    """Kernels on GPUs: auto (TransformerEngine's where it imports, else torch's) | te | torch.
    A CPU has torch's alone."""
    compile: bool | None = None
    """Let Megatron compile its small functions with torch.compile, which needs Triton and a C
    compiler on every node; None is as Megatron ships it with te, and off with torch."""

    timeout_seconds: int = 600
    """A step, validation or save that takes longer counts as hung: its rank writes its stacks to
    logs/, names who is to blame and ends with exit code 6."""
    host_threads: int = 1
    """CPU threads per rank on the host backend; 1 is bitwise reproducible."""
    cuda_device_max_connections: int | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS; null is by rule: 32 where the expert exchange overlaps, else 1
    under tensor or context parallelism, else unset."""
    expandable_segments: bool | None = None
    """Let torch's allocator grow its segments (PYTORCH_ALLOC_CONF); null is by rule: on, except
    with NCCL user buffers or CUDA graphs. A setting that the environment has is kept."""
    nccl: dict[str, str] = field(default_factory=dict)
    """NCCL_* environment settings by their short name, e.g. {IB_QPS_PER_CONNECTION: 2}."""
    nccl_groups: dict[str, NcclGroup] = field(default_factory=dict)
    """NCCL's settings of single process groups, e.g. {ep: {max_ctas: 16}}; on CUDA."""

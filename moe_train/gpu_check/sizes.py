"""Models and amounts: full ones for a GPU, tiny ones that run the same machinery on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

QUIET = ["log.wandb=disabled", "log.console=lines", "train.eval_every=0", "checkpoint.every=0"]
"""A run that writes its metrics and nothing else."""

STEPS = 30
"""Steps of a reference curve; its first CURVE are compared, the others serve continued runs."""
CURVE = 20

SMALL = [
    *("experiment=twin", "parallel=single", "recompute=none"),
    *("model.layers=4", "model.hidden=128", "model.heads=8", "model.head_dim=16"),
    *("model.experts=16", "model.expert_hidden=64", "data.sequence=128"),
    *("batch.micro=2", "batch.global=8", "optim.lr=6e-4", "optim.embedding_lr=null"),
    *("optim.warmup_steps=10", f"optim.decay_steps={STEPS}"),
]
"""The model of every loss curve: 4 layers, 16 experts, 1024 tokens a step.

Widths are multiples of 16 bytes in bf16, as grouped products ask for. Warm-up is long and the
rate low enough that rounding is not magnified into other routes within the curve.
"""

FULL = [
    *("experiment=single", "dtype=bf16", "recompute=none", "model.heads=16"),
    *("model.head_dim=128", "model.hidden=2048", "model.layers=6", "model.experts=16"),
    *("model.expert_hidden=1024", "model.vocab=32000", "data.sequence=4096"),
    *("batch.micro=2", "batch.microbatches=4", "batch.accumulation=1"),
    *("optim.distributed=true", "optim.precision_aware=true", "optim.moment_dtype=bf16"),
    *("optim.grad_dtype=bf16", "optim.lr=1e-4"),
]
"""0.85 B parameters, 8192 tokens a micro-batch, 1024 rows an expert: keeps an 80 GB GPU busy.

More parameters would make the run longer by their initial values alone, which one CPU thread
draws."""

TINY = [
    *SMALL,
    *("dtype=bf16", "optim.distributed=true", "optim.precision_aware=true"),
    *("optim.moment_dtype=bf16", "optim.grad_dtype=bf16", "model.layers=2"),
]

DEEP = [
    *("experiment=single", "dtype=bf16", "model.layers=16", "model.hidden=1024"),
    *("model.heads=16", "model.head_dim=64", "model.experts=8", "model.expert_hidden=512"),
    *("model.vocab=32000", "data.sequence=2048", "batch.micro=4", "batch.microbatches=2"),
    *("batch.accumulation=1", "optim.lr=1e-4"),
]
"""16 layers, 0.33 B parameters, 8192 tokens a micro-batch: activations outweigh the state."""


WIDE = [*SMALL, "dtype=bf16", "data.sequence=4096", "batch.micro=64", "batch.global=64"]
"""A quarter of a million tokens a micro-batch: a few GB of activations over next to no state."""
HELD_BACK_GB = 3.0
"""What a run of WIDE finds free on a card that another process holds: enough to start, and less
than half of what it needs."""


@dataclass(frozen=True)
class Sizes:
    """Sizes for a kind of device."""

    gpu: bool
    large: list[str]
    """The model of the timings."""
    rows: list[int]
    """Rows an expert of the grouped products."""
    experts: tuple[int, int, int]
    """Experts, hidden and inner width of the grouped products: those of the 30B's rank."""
    attention: tuple[int, int, int, int]
    """Sequences, heads, tokens and width of a head."""

    def device(self, kernels: str) -> list[str]:
        """Overrides that choose device and kernels."""
        return ["device=cuda", f"backend.kernels={kernels}"] if self.gpu else ["device=cpu"]


GPU = Sizes(
    gpu=True,
    large=FULL,
    rows=[16, 32, 64, 128, 256, 512, 1024, 2048],
    experts=(32, 4608, 2048),
    attention=(1, 16, 4096, 128),
)
CPU = Sizes(gpu=False, large=TINY, rows=[16, 32], experts=(4, 64, 32), attention=(1, 2, 64, 16))

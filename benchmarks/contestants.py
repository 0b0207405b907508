"""The contestants: each builds the same model from the same sizes and trains it step by step.

None of them is spared anything: every step runs all micro-batches forward and backward, clips by
the global norm and lets Adam update all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import TOKENS, VOCAB, Case
from moe_train.backend.groups import open_groups, open_world
from moe_train.backend.select import select_backend
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.resolution import resolve_run

type Step = Callable[[], float]
"""One optimizer step; returns its loss."""


def ours(case: Case) -> Step:
    """moe_train: Megatron-Core on the CPU backend."""
    from moe_train.train.engine import build_engine
    from moe_train.train.step import require_finite, train_step

    run, backend, groups = _opened(case)
    engine = build_engine(run, backend, groups)
    numbers = iter(range(1, 1_000_000))
    batches = _batches(case, run.config.data.sequence, run.microbatches)

    def step() -> float:
        number = next(numbers)
        return require_finite(number, train_step(engine, batches, number)).loss

    return step


def megatron_sequential(case: Case) -> Step:
    """Megatron-Core's own layers for a CPU: one pair of products per expert."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moe_train.model.transformer_config import transformer_config

    run, backend, _ = _opened(case)
    config, count = run.config, run.microbatches
    config.megatron.transformer["moe_grouped_gemm"] = False
    megatron = transformer_config(config, backend)
    model_parallel_cuda_manual_seed(config.run.seed)
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=config.model.experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=VOCAB,
        max_sequence_length=config.data.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = torch.ones(1, 1, config.data.sequence, config.data.sequence, dtype=torch.bool)
        args = (batch["tokens"], batch["position_ids"], mask.triu(1))
        result: torch.Tensor = model(*args, labels=batch["labels"]).mean()
        return result

    return _plain_step(model, loss, _batches(case, config.data.sequence, count))


def mixtral_grouped_fused(case: Case) -> Step:
    """Transformers' Mixtral, grouped products for the experts, fused Adam."""
    return _mixtral(case, "grouped_mm")


def mixtral_eager_fused(case: Case) -> Step:
    """Transformers' Mixtral, a loop over experts, fused Adam."""
    return _mixtral(case, "eager")


def _mixtral(case: Case, experts: str) -> Step:
    import transformers

    from moe_train.convert.architecture import hf_config
    from moe_train.convert.registry import ARCHITECTURES

    config = resolve_run([*case.overrides, "model.router.balancing=none"], 1).config
    mixtral = ARCHITECTURES["mixtral"]
    settings = hf_config(mixtral, config.model, VOCAB, "float32", config.data.sequence)
    made = transformers.AutoConfig.for_model(
        **settings, attn_implementation="sdpa", experts_implementation=experts
    )
    model = transformers.MixtralForCausalLM(made).train()
    assert model.config._experts_implementation == experts

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["tokens"], use_cache=False).logits
        result: torch.Tensor = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten()
        )
        return result

    count = TOKENS // config.data.sequence // case.micro
    return _plain_step(model, loss, _batches(case, config.data.sequence, count))


CONTESTANTS = {
    build.__name__: build
    for build in (ours, megatron_sequential, mixtral_grouped_fused, mixtral_eager_fused)
}


def _opened(case: Case) -> tuple[ResolvedRun, Any, Any]:
    run = resolve_run(case.overrides, 1).with_vocabulary(VOCAB, "the benchmark")
    backend = select_backend(run.config.device, run.config.backend)
    backend.prepare()
    open_world(backend, 0, 1, 60)
    return run, backend, open_groups(run.layout, timeout_seconds=60)


def _batches(case: Case, sequence: int, count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    shape = (case.micro, sequence)
    return [
        {
            "tokens": torch.randint(0, VOCAB, shape, generator=draw),
            "labels": torch.randint(0, VOCAB, shape, generator=draw),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(sequence).expand(shape),
        }
        for _ in range(count)
    ]


def _plain_step(
    model: torch.nn.Module,
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    batches: list[dict[str, torch.Tensor]],
) -> Step:
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return total

    return step

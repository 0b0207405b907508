"""Host attention, norm and grouped experts against plain references and Megatron's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_train.testing.world import run_world
from tests.support.engines import assemble, fill, gradient_shards, open_engine, shards

SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.experts=4"),
    *("model.expert_hidden=24", "data.sequence=16", "recompute=none", "parallel=single"),
    *("batch.global=4", "model.vocab=128", "optim.clip=0"),
]


def _attention(rank: int, world: int) -> None:
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe_train.backend.torch_kernels.attention import TorchAttention

    for heads, kv_heads, mask, scale in (
        (4, 4, AttnMaskType.causal, None),
        (6, 2, AttnMaskType.causal, None),
        (6, 1, AttnMaskType.no_mask, 0.7),
    ):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=48,
            num_attention_heads=heads,
            num_query_groups=kv_heads,
            kv_channels=8,
            attention_dropout=0.0,
        )
        attention = TorchAttention(config, 1, mask, "self", softmax_scale=scale)
        torch.manual_seed(0)
        query = torch.randn(9, 2, heads, 8, requires_grad=True)
        key, value = (torch.randn(9, 2, kv_heads, 8, requires_grad=True) for _ in "kv")
        ours = attention(query, key, value, None)
        assert ours.shape == (9, 2, heads * 8)

        # A plain softmax, head by head: query head h reads group h // (heads / kv_heads).
        parts = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = torch.einsum("sbd,tbd->bst", query[:, :, head], key[:, :, group])
            scores = scores * (scale or 8**-0.5)
            if mask == AttnMaskType.causal:
                scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
            parts.append(torch.einsum("bst,tbd->sbd", scores.softmax(-1), value[:, :, group]))
        plain = torch.cat(parts, dim=-1)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        upstream = torch.randn_like(plain)
        inputs = (query, key, value)
        for mine, other in zip(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(plain, inputs, upstream),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_attention_is_a_plain_softmax() -> None:
    run_world(_attention, 1)


def _norm(rank: int, world: int) -> None:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe_train.backend.torch_kernels.provider import TorchNorm

    for kind, parallel in (("RMSNorm", True), ("RMSNorm", False), ("LayerNorm", True)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=kind,
            tensor_model_parallel_size=2 if parallel else 1,
            sequence_parallel=parallel,
        )
        norm: Any = TorchNorm(config, 8, eps=1e-3)
        assert len(list(norm.parameters())) == (1 if kind == "RMSNorm" else 2)
        assert all(p.sequence_parallel is parallel for p in norm.parameters())
        x = torch.randn(5, 8)
        centred = x if kind == "RMSNorm" else x - x.mean(-1, keepdim=True)
        plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        torch.testing.assert_close(norm(x), plain)


def test_norm_and_its_mark() -> None:
    run_world(_norm, 1)


def _experts(rank: int, world: int) -> None:
    """TorchGroupedMLP and SequentialMLP with the same weights: outputs, gradients, shards."""
    import copy

    import torch
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    engine = open_engine(rank, world, [*SMALL, *_layout(world)])
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    local = 4 // engine.groups.ep.size()
    config = copy.copy(engine.megatron)
    config.perform_initialization = True
    groups = ProcessGroupCollection.use_mpu_process_groups()
    grouped = engine.backend.spec_provider().grouped_mlp_modules(True)(
        num_local_experts=local, config=config, pg_collection=groups, name=None
    )
    sequential = LocalSpecProvider().grouped_mlp_modules(True)(
        num_local_experts=local, config=config, pg_collection=groups
    )
    with torch.no_grad():
        for index, expert in enumerate(sequential.local_experts):
            expert.linear_fc1.weight.copy_(grouped.linear_fc1.weight[index])
            expert.linear_fc2.weight.copy_(grouped.linear_fc2.weight[index])
            assert expert.linear_fc1.weight.std() > 0
    for counts in _counts(local):
        tokens = torch.randn(sum(counts), 32, requires_grad=True)
        probabilities = torch.rand(sum(counts), requires_grad=True)
        upstream = torch.randn(sum(counts), 32)
        answers = []
        for module in (grouped, sequential):
            module.zero_grad()
            output, bias = module(tokens, torch.tensor(counts), probabilities)
            assert bias is None and output.shape == tokens.shape
            inner = torch.autograd.grad(
                output, (tokens, probabilities), upstream, retain_graph=True, allow_unused=True
            )
            output.backward(upstream)
            answers.append((output, *inner))
        for name, mine, other in zip(("output", "tokens", "probs"), *answers, strict=True):
            if sum(counts):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=name)
        for linear in ("linear_fc1", "linear_fc2"):
            mine = getattr(grouped, linear).weight.grad
            assert mine is not None, "a weight without gradient would stall its bucket"
            others = [getattr(e, linear).weight.grad for e in sequential.local_experts]
            for index, other in enumerate(others):
                expected = torch.zeros_like(mine[index]) if other is None else other
                torch.testing.assert_close(mine[index], expected, rtol=1e-4, atol=1e-6)
                assert bool(mine[index].any()) is bool(counts[index])


def _counts(local: int) -> list[list[int]]:
    return [[3, 0, 5, 1][:local], [0, 7, 0, 0][:local], [0, 0, 0, 0][:local]]


def _layout(world: int) -> list[str]:
    return [f"parallel.expert={world}"]


@pytest.mark.parametrize("world", [1, 2])
def test_grouped_experts_are_sequential_experts(world: int) -> None:
    run_world(_experts, world)


def _keys(rank: int, world: int, layout: list[str]) -> Any:
    """Sharded (key, global shape, offset, local shape, replica) of both expert modules."""
    import copy

    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection

    engine = open_engine(rank, world, [*SMALL, *layout])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    local = 4 // engine.groups.ep.size()
    config = copy.copy(engine.megatron)
    answers = []
    for provider in (engine.backend.spec_provider(), LocalSpecProvider()):
        extra = {"name": None} if provider is not None and not answers else {}
        module = provider.grouped_mlp_modules(True)(
            num_local_experts=local, config=config, pg_collection=groups, **extra
        )
        state = module.sharded_state_dict("mlp.experts.", ((0, 1, 2),))
        apply_factories(state)
        result = set()
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                # One expert of one rank, in global terms, however many a tensor stacks.
                axes = len(tensor.global_shape) - 2
                stacked = tensor.data.reshape(-1, *tensor.data.shape[-2:])
                for index, matrix in enumerate(stacked):
                    offset = list(tensor.global_offset)
                    offset[axes - 1] += index
                    result.add(
                        (
                            tensor.key,
                            tuple(tensor.global_shape),
                            tuple(offset),
                            tuple(matrix.shape),
                            tensor.replica_id,
                        )
                    )
        answers.append(result)
    return answers


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (2, ["parallel.expert=2"]),
        (2, ["parallel.tensor=2", "parallel.expert_tensor=2"]),
        (2, ["parallel.expert=1"]),
    ],
)
def test_shards_are_those_of_sequential_experts(world: int, layout: list[str]) -> None:
    for ours, theirs in run_world(_keys, world, layout):
        assert ours == theirs
        assert {key for key, *_ in ours} == {
            "mlp.experts.experts.linear_fc1.weight",
            "mlp.experts.experts.linear_fc2.weight",
        }


def _filled(rank: int, world: int) -> Any:
    engine = open_engine(rank, world, [*SMALL, *_layout(world)])
    generator = np.random.default_rng(5)
    wanted = {s.key: generator.normal(size=s.shape).astype("float32") for s in shards(engine)}
    fill(engine, wanted)
    return wanted, shards(engine), gradient_shards(engine)


def test_helpers_fill_and_gather_what_they_say() -> None:
    """The tests above and the oracle stand on these."""
    ranks = run_world(_filled, 2)
    whole = assemble([filled for _, filled, _ in ranks])
    assert whole.keys() == ranks[0][0].keys()
    assert all(np.array_equal(whole[key], ranks[0][0][key]) for key in whole)
    assert not any(gradient.any() for gradient in assemble([g for *_, g in ranks]).values())
    with pytest.raises(AssertionError, match="parts missing"):
        assemble([ranks[0][1]])
    broken = [shard for shard in ranks[1][1] if "norm" in shard.key][:1]
    broken[0].data[...] += 1
    with pytest.raises(AssertionError, match="replicas differ"):
        assemble([ranks[0][1], broken])

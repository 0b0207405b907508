"""Random models of Transformers, three shapes of each architecture, and our logits for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB, SEQUENCE, BATCH = 96, 20, 2
# Big enough that attention and routing are far from uniform.
STD = 0.12
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "initializer_range": STD,
    "rms_norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {
        "gqa": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 12},
        "mha-tied": {
            "num_key_value_heads": 4,
            "intermediate_size": 20,
            "num_local_experts": 6,
            "tie_word_embeddings": True,
        },
        "odd": {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 3},
    },
    "qwen3_moe": {
        "gqa": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 12,
                "norm_topk_prob": True, "num_experts_per_tok": 2},
        "mha-tied": {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
        "odd": {"moe_intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 1,
                "head_dim": 8},
    },
    "olmoe": {
        "gqa": {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
        "mha-tied": {
            "num_key_value_heads": 4,
            "intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
        },
        "odd": {"intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2,
                "num_key_value_heads": 1},
    },
    "glm4_moe": {
        "gqa": {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 4,
                "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.5,
                "use_qk_norm": True, "head_dim": 12},
        "mha-tied": {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 20,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "tie_word_embeddings": True,
            "head_dim": 8,
        },
        "odd": {"moe_intermediate_size": 24, "n_routed_experts": 5, "num_experts_per_tok": 1,
                "norm_topk_prob": False, "head_dim": 8},
    },
}  # fmt: skip
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def network(name: str, shape: str) -> Any:
    """A random model of Transformers in fp32, with nothing at its initial constant."""
    import transformers

    fields = COMMON | SHAPES[name][shape] | {"rope_parameters": dict(ROPE)}
    if name == "glm4_moe":
        fields |= {"first_k_dense_replace": 0, "num_mtp_layers": 0}
        fields["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    config = transformers.AutoConfig.for_model(name, **fields)
    config._attn_implementation = "eager"
    torch.manual_seed(len(name) + len(shape))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            if key.endswith("gate.weight"):
                tensor.normal_(0, STD * 3)
            if key.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
    return model


def tokens() -> np.ndarray[Any, Any]:
    """[BATCH, SEQUENCE]"""
    return np.random.default_rng(7).integers(0, VOCAB, (BATCH, SEQUENCE))


@torch.no_grad()
def their_logits(model: Any) -> np.ndarray[Any, Any]:
    """[BATCH, SEQUENCE, VOCAB]"""
    logits: np.ndarray[Any, Any] = model(input_ids=torch.from_numpy(tokens())).logits.numpy()
    return logits


def overrides_of(model: Any) -> list[str]:
    """Overrides of the model group, for a ModelConfig."""
    from moe_train.config.schema import to_mapping, walk

    lines = []
    for key, value in walk(to_mapping(model)):
        if not isinstance(value, dict):
            text = "null" if value is None else str(value)
            lines.append(f"model.{key}={text.lower() if isinstance(value, bool) else text}")
    return lines


@dataclasses.dataclass
class Answer:
    """What the model here says with a folder's weights, and with random ones that it then saves."""

    imported: Any
    """Logits [BATCH, SEQUENCE, VOCAB]."""
    random: Any
    checkpoint: str
    """Of the random weights."""


def answers(rank: int, world: int, folders: Sequence[str], root: str) -> dict[str, Answer]:
    """An answer for each folder; checkpoints go below ``root``."""
    from moe_train.backend.groups import close_world
    from moe_train.checkpoint.manifest import identity
    from moe_train.checkpoint.save import Save
    from moe_train.convert.folder import open_folder
    from moe_train.convert.loading import check_model, load_weights
    from moe_train.model.initialise import initialise
    from tests.support.engines import open_engine

    results: dict[str, Answer] = {}
    for number, folder in enumerate(folders):
        opened = open_folder(Path(folder))
        run = [
            *overrides_of(opened.model),
            *(f"data.sequence={SEQUENCE}", f"batch.global={BATCH}", "batch.micro=1"),
            *("recompute=none", "parallel=single", "dtype=fp32"),
        ]
        engine = open_engine(rank, world, run, VOCAB)
        check_model(opened, engine.config.model, VOCAB)
        chunks = [chunk.module for chunk in engine.chunks]
        load_weights(opened, chunks)
        imported = logits_of(engine)
        initialise(chunks, engine.megatron, seed=number)
        save = Save(
            Path(root) / str(number),
            step=7,
            chunks=chunks,
            optimizer=engine.optimizer,
            keep=1,
            fields={
                "model": identity(opened.model, VOCAB),
                "layout": "single",
                "world": 1,
                "seed": number,
                "tokenizer": "unknown",
                "consumed_samples": 0,
                "consumed_tokens": 0,
            },
        )
        results[folder] = Answer(imported, logits_of(engine), str(save.commit()))
        close_world()
    return results


def logits_of(engine: Any) -> np.ndarray[Any, Any]:
    """Of `tokens`, from one rank: [BATCH, SEQUENCE, VOCAB]"""
    from moe_train.train.step import validate
    from tests.support.engines import micro_batches

    rows: list[Any] = []
    hook = engine.chunks[-1].module.output_layer.register_forward_hook(
        lambda module, inputs, output: rows.append(
            output[0].detach().transpose(0, 1).numpy().copy()
        )
    )
    targets = np.concatenate([tokens(), tokens()[:, :1]], 1)
    validate(engine, [micro_batches(engine, targets)])
    hook.remove()
    return np.concatenate(rows)

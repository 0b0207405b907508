"""Tiny models trained by Transformers' own Trainer, and what Transformers says of them."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

VOCAB, SEQUENCE, BATCH = 512, 64, 8
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 6, "norm_topk_prob": True},
}


def text() -> str:
    """Some hundred thousand characters of the running Python's own sources."""
    return "".join(inspect.getsource(module) for module in (argparse, ast, textwrap, inspect))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCAB` entries, as Transformers saves it."""
    import transformers

    from moe_train.data.tokenizer import train_bpe

    source = folder / "bpe.json"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(train_bpe(text().splitlines(keepends=True), VOCAB), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    source.unlink()


def ids_of(folder: Path, content: str) -> list[int]:
    """Token ids by Transformers' tokenizer of the folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    return ids


@dataclass
class Step:
    """What the Trainer saw in one step."""

    loss: float
    grad_norm: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads of torch in this process, which other tests share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(model: Any, rows_NS: NDArray[Any], folder: Path, lr: float) -> list[Step]:
    """Train on the rows in their order, `BATCH` a step, with AdamW at a constant rate.

    Args:
        rows_NS: token ids, each row one token longer than the positions that are predicted.
        folder: for the Trainer's own files.
    """
    import transformers
    from torch.utils.data import SequentialSampler

    losses: list[float] = []
    norms: list[float] = []

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(range(len(rows_NS)))

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            value = loss[0] if isinstance(loss, tuple) else loss
            losses.append(value.item())
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                norms.append(float(logs["grad_norm"]))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=len(rows_NS) // BATCH,
        per_device_train_batch_size=BATCH,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows_NS)]
    with one_thread():
        InOrder(model=model, args=arguments, train_dataset=dataset).train()
    return [Step(*pair) for pair in zip(losses, norms, strict=True)]


def train_and_save(name: str, folder: Path, steps: int) -> list[Step]:
    """A new model, trained on the text and saved to ``folder`` with its tokenizer."""
    import transformers

    write_tokenizer(folder)
    config = transformers.AutoConfig.for_model(name, **FIELDS, **ARCHITECTURES[name])
    torch.manual_seed(17)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = np.array(ids_of(folder, text()))
    starts = np.random.default_rng(3).integers(0, len(tokens) - SEQUENCE - 1, steps * BATCH)
    rows_NS = tokens[starts[:, None] + np.arange(SEQUENCE + 1)]
    told = train(model, rows_NS, folder / "trainer", 3e-3)
    model.save_pretrained(folder)
    return told


def load(folder: Path) -> Any:
    """The saved model."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(folder: Path, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    """Transformers' own `generate`, each prompt by itself."""
    model, completions = load(folder), []
    with one_thread():
        for prompt in prompts:
            ids = torch.tensor([ids_of(folder, prompt)])
            output = model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
            completions.append(output[0, ids.size(1) :].tolist())
    return completions


@torch.no_grad()
def window_loss(folder: Path, content: str, length: int) -> float:
    """Mean loss of a text's tokens but the first, in windows of ``length``."""
    model, ids = load(folder), ids_of(folder, content)
    total = 0.0
    with one_thread():
        for start in range(0, len(ids) - 1, length):
            part = torch.tensor([ids[start : start + length + 1]])
            logits = model(input_ids=part[:, :-1]).logits[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
    return total / (len(ids) - 1)

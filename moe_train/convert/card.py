"""The model card of an export: what the model is, how it was trained, how to check it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.convert.architecture import Architecture
from moe_train.parallel.parameters import model_parameters


@dataclass(frozen=True)
class Facts:
    """Of a training, as far as its run folder and checkpoint tell."""

    step: int = 0
    tokens: int = 0
    """Consumed until the checkpoint."""
    layout: str = ""
    training_loss: float | None = None
    """At the checkpoint's step, nats per token."""
    validation_loss: float | None = None
    """The last until that step."""


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- {name}
---

# {title} model, {total} parameters

{class_name} of Transformers: {about}. {active} parameters are active for a token.

| | |
|---|---|
{rows}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

The embedding has {vocab:,} rows: the vocabulary padded as in training, since the padding takes part
in the softmax.

## Check

`moe-train verify-hf THIS_FOLDER` compares every tensor with `moe_train_export.json`; SHA-256 over
all of them: `{digest}`.
"""


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def model_card(
    architecture: Architecture, config: Config, vocab: int, facts: Facts, digest: str
) -> str:
    """README.md of an export."""
    model, counts = config.model, model_parameters(config.model, vocab)
    lines = {
        "layers, hidden": f"{model.layers}, {model.hidden}",
        "heads, key/value heads, head width": (
            f"{model.heads}, {model.num_query_groups}, {model.kv_channels}"
        ),
        "experts, of these for a token, width": (
            f"{model.experts}, {model.experts_per_token}, {model.expert_hidden}"
        ),
        "shared expert": str(model.shared_expert_hidden or "none"),
    }
    if facts.step:
        lines |= {
            "training steps": f"{facts.step:,}",
            "training tokens": f"{facts.tokens:,}",
            "sequence": f"{config.data.sequence:,}",
            "precision": config.dtype,
            "optimizer": f"{config.optim.name}, peak learning rate {config.optim.lr:g}",
            "balancing": config.model.router.balancing,
            "layout": facts.layout,
            "data": ", ".join(config.data.train) or "the running Python's standard library",
        }
    for name, loss in (("training", facts.training_loss), ("validation", facts.validation_loss)):
        if loss is not None:
            lines[f"{name} loss, nats per token"] = f"{loss:.4f}"
    return _CARD.format(
        name=architecture.name,
        title=architecture.title,
        class_name=architecture.class_name,
        about=architecture.about,
        total=_millions(counts.total),
        active=_millions(counts.active),
        rows="\n".join(f"| {name} | {value} |" for name, value in lines.items()),
        vocab=vocab,
        digest=digest,
    )

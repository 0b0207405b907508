"""``verify-hf --logits``: the same tokens through the model here and through Transformers'."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moe_train.backend.select import select_backend
from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.convert.folder import HfFolder, open_folder
from moe_train.data.tokenizer import FileTokenizer
from moe_train.errors import ConfigError

MAX_TOKENS = 512
TEXT = (
    "The mixture of experts layer replaces the feed-forward network of a transformer block: a "
    "router scores the experts for each token, and the token is sent to the best of them.\n"
    "def route(scores, k):\n    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]\n"
)


def compare_logits(path: Path, text: str | None) -> dict[str, Any]:
    """Compare logits of a folder.

    Args:
        text: None takes a sentence and a piece of code; without a tokenizer, random ids.

    Returns:
        ``tokens``, the largest absolute ``difference``, and the ``largest`` logit.

    Raises:
        ConfigError: Transformers is not installed.
        CheckpointError: the folder is damaged.
        DataError: its tokenizer is.
    """
    try:
        # Not a dependency: an extra, and only of this.
        transformers = importlib.import_module("transformers")
    except ImportError as missing:
        raise ConfigError(
            "--logits", "Transformers is not installed", "pip install 'moe-train[hf]'"
        ) from missing
    folder = open_folder(path)
    tokens_1S = _tokens(folder, text)
    # First: the backend's patches would change what Transformers' modules do when imported.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens_1S).logits
    del model
    ours = our_logits(folder, tokens_1S)
    return {
        "tokens": tokens_1S.numel(),
        "difference": (ours - theirs).abs().max().item(),
        "largest": theirs.abs().max().item(),
        "equal_top_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def _tokens(folder: HfFolder, text: str | None) -> torch.Tensor:
    file = folder.path / "tokenizer.json"
    if file.is_file():
        ids = FileTokenizer(file).encode(text or TEXT)[:MAX_TOKENS]
        ids = [one for one in ids if one < folder.vocab]
    elif text is not None:
        raise ConfigError("--text", f"{folder.path} has no tokenizer.json", "leave --text out")
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(folder.vocab, (128,), generator=generator).tolist()
    if not ids:
        raise ConfigError("--text", "the text has no tokens", "give a longer text")
    return torch.tensor([ids])


def our_logits(folder: HfFolder, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of the model here, in one process on the CPU, in fp32."""
    backend = select_backend("cpu", Config().backend)
    backend.prepare()
    from moe_train.backend.groups import close_world, open_groups, open_world
    from moe_train.convert.loading import load_weights
    from moe_train.planner.resolution import resolve_run
    from moe_train.train.engine import build_engine, release

    overrides = [
        *(f"model.{key}={_written(value)}" for key, value in _leaves(to_mapping(folder.model))),
        *("device=cpu", "dtype=fp32", "parallel=single", "recompute=none", "optim.name=sgd"),
        f"data.sequence={tokens_BS.shape[1]}",
    ]
    with ExitStack() as stack:
        run = resolve_run(overrides, 1).with_vocabulary(folder.vocab, "config.json")
        open_world(backend, 0, 1, 600)
        stack.callback(close_world)
        engine = build_engine(run, backend, open_groups(run.layout, timeout_seconds=600))
        stack.callback(release, engine)
        module = engine.chunks[0].module
        load_weights(folder, [module])
        module.eval()
        positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        with torch.no_grad():
            logits: torch.Tensor = module(tokens_BS, positions, None)
        return logits.float().clone()


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [
        leaf
        for key, value in node.items()
        for leaf in _leaves(value, f"{prefix}.{key}".lstrip("."))
    ]


def _written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Tokenizers in and out: the files of a Hugging Face folder, and the ids that its config names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config.root import Config
from moe_train.convert.folder import read_json
from moe_train.data import tokenizer as data_tokenizers
from moe_train.data.cache import cache_folder
from moe_train.data.corpus import parse_blend
from moe_train.data.embedded import DEFAULT_TOKENIZER, embedded_corpus
from moe_train.data.manifest import read_manifest
from moe_train.data.tokenizer import EOD_NAMES, ByteTokenizer, FileTokenizer, Tokenizer
from moe_train.errors import CheckpointError, DataError

ORIGIN = "huggingface.json"
"""Of an imported folder: config.json and generation_config.json as they were."""
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "chat_template.jinja",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Tokens:
    """What an export says of tokens."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Of the tokenizer, by name; none where it is unknown."""
    ids: Mapping[str, Any] = field(default_factory=lambda: dict.fromkeys(_IDS))
    """Fields of config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json."""
    positions: int = 0
    """max_position_embeddings."""


def tokens_of_import(folder: Path) -> Tokens | None:
    """Those of the folder that was imported to ``folder``; None if none was.

    Raises:
        CheckpointError: its record is damaged.
    """
    if not (folder / ORIGIN).is_file():
        return None
    origin = read_json(folder / ORIGIN)
    config, generation = origin.get("config"), origin.get("generation_config")
    if not isinstance(config, dict):
        raise CheckpointError(str(folder / ORIGIN), "has no config", "import the folder again")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    ids = {name: config[name] for name in _IDS if name in config}
    positions = config.get("max_position_embeddings")
    return Tokens(
        files,
        ids,
        generation if isinstance(generation, dict) else ids,
        positions if isinstance(positions, int) else 0,
    )


def tokens_of(tokenizer: Tokenizer, positions: int) -> Tokens:
    """Those of a tokenizer of this project."""
    import tokenizers

    source = tokenizer.source if isinstance(tokenizer, FileTokenizer) else byte_tokenizer_json()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    if tokenizer.eod is not None:
        settings["eos_token"] = tokenizers.Tokenizer.from_str(source).id_to_token(tokenizer.eod)
    ids = {**dict.fromkeys(_IDS), "eos_token_id": tokenizer.eod}
    files = {
        "tokenizer.json": source.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    return Tokens(files, ids, ids, positions)


def byte_tokenizer_json() -> str:
    """A tokenizer.json that maps UTF-8 bytes to ids as `ByteTokenizer` does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The pre-tokenizer writes each byte as a printable character; GPT-2's table, in byte order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(EOD_NAMES[0], special=True)])
    assert library.token_to_id(EOD_NAMES[0]) == ByteTokenizer.eod
    return str(library.to_str(pretty=True))


def tokenizer_of_run(config: Config) -> Tokenizer:
    """The tokenizer of a run's data.

    Raises:
        DataError: the data or the tokenizer is not there, or the data name none.
    """
    data = config.data
    if data.tokenizer and not data.tokenizer.startswith("bpe:"):
        return data_tokenizers.load(data.tokenizer)
    if data.train:
        prefix = parse_blend("data.train", data.train)[0][0]
    else:
        from moe_train.backend.select import select_backend

        backend = select_backend("cpu", config.backend)
        cache = cache_folder(data.cache)
        prefix = embedded_corpus(cache, data.tokenizer or DEFAULT_TOKENIZER, backend.prepare)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(str(prefix), "names no tokenizer", "give --tokenizer")
    return manifest.open_tokenizer(prefix)

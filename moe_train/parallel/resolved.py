"""`ResolvedRun`: the frozen result of resolving a run's overrides for a number of ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.files import json_digest
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import padded_vocab
from moe_train.parallel.sizes import layout_of

BYTE_VOCAB = 257
EMBEDDED_VOCAB = 4096


@dataclass(frozen=True)
class ResolvedRun:
    """A legal configuration, its layout, and every size that follows from the two.

    `moe_train.planner.resolution.resolve_run` builds it; ranks compare `digest` before process
    groups exist. It never changes: the ``with_`` methods return another one, with what is known
    only once the run folder and the data are open.
    """

    config: Config
    """Every parallel size and environment setting filled in."""
    layout: Layout
    vocab: int
    """Entries of the vocabulary, unpadded; assumed until the data are open."""
    vocab_source: str
    """Where `vocab` comes from."""
    notes: tuple[str, ...] = ()
    """Warnings: of the hardware, and of options that Megatron computes per rank."""

    @cached_property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the output layer."""
        return padded_vocab(self.vocab, self.config.model.vocab_multiple)

    @cached_property
    def microbatches(self) -> int:
        """Micro-batches per replica and optimizer step, all in one pipeline flush."""
        return self.config.batch.per_step(self.layout.data)

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step, over all replicas."""
        return self.config.batch.sequences(self.layout.data)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step, over all replicas."""
        return self.sequences * self.config.data.sequence

    def to_mapping(self) -> dict[str, Any]:
        """What all ranks must have in common: the config by key, then the layout.

        The vocabulary is left out: files of data are checked, and reported as faults of the
        data, when they are opened.
        """
        return {**to_mapping(self.config), "layout": dataclasses.asdict(self.layout)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_mapping`, hexadecimal."""
        return json_digest(self.to_mapping())

    def with_vocabulary(self, vocab: int, source: str) -> ResolvedRun:
        """With the vocabulary of the opened data."""
        return dataclasses.replace(self, vocab=vocab, vocab_source=source)

    def with_notes(self, notes: Sequence[str]) -> ResolvedRun:
        """With warnings about the hardware."""
        return dataclasses.replace(self, notes=tuple(notes))

    def with_name(self, name: str) -> ResolvedRun:
        """With the name of the run folder as ``run.name``."""
        config = self.config
        return dataclasses.replace(
            self, config=dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
        )


def resolved_run(config: Config, world: int) -> ResolvedRun:
    """`ResolvedRun` of a legal config whose parallel sizes are all set."""
    return ResolvedRun(config, layout_of(config, world), *vocabulary(config))


def vocabulary(config: Config) -> tuple[int, str]:
    """Tokens in the vocabulary, unpadded, and where the number comes from.

    A tokenizer file or the embedded corpus is not opened for a plan; a dataset's
    manifest (``PREFIX.json``) is, since it is small.
    """
    if config.model.vocab is not None:
        return config.model.vocab, "model.vocab"
    if config.data.tokenizer == "byte":
        return BYTE_VOCAB, "byte tokenizer"
    for entry in config.data.train:
        manifest = Path(entry.rpartition(":")[2] + ".json")
        if manifest.is_file() and (size := _vocab_size(manifest)) is not None:
            return size, str(manifest)
    source = "the data's tokenizer decides" if config.data.train else "embedded corpus"
    return EMBEDDED_VOCAB, f"assumed ({source}); set model.vocab to fix it"


def _vocab_size(manifest: Path) -> int | None:
    """The manifest's size, or None: opening the data reports what is wrong with the file."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    size = content.get("vocab_size") if isinstance(content, dict) else None
    return size if type(size) is int and 0 < size < 1 << 31 else None

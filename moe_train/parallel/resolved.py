"""`ResolvedRun`: the frozen result of resolving a run's overrides for a number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.parallel.batch import microbatches_per_step
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import padded_vocab
from moe_train.parallel.sizes import layout_of
from moe_train.parallel.vocabulary import vocabulary


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
        return microbatches_per_step(self.config, self.layout.data)

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step, over all replicas."""
        return self.microbatches * self.config.batch.micro * self.layout.data

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
        text = json.dumps(self.to_mapping(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

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

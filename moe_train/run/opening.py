"""Open what training and evaluation share: data, world, groups, model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_train.backend.select import select_backend
from moe_train.data.blend import open_corpus
from moe_train.errors import MoeTrainError, NonFiniteError, Preempted
from moe_train.parallel.batch import microbatches_per_step, sequences_per_step
from moe_train.parallel.parameters import padded_vocab
from moe_train.run.failure import clear
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.rank_log import log_to_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config
    from moe_train.data.blend import Corpus
    from moe_train.parallel.layout import Layout
    from moe_train.train.engine import Engine


@dataclass
class Session:
    """One rank's open program."""

    config: Config
    layout: Layout
    rank: int
    world: int
    corpus: Corpus
    vocab: int
    """Ids that the model has, before padding."""
    engine: Engine
    folder: RunFolder | None
    """The run folder, the same on every rank; None for a program that has none."""

    @property
    def batch(self) -> int:
        """Sequences of a global batch."""
        return sequences_per_step(self.config, self.layout.data)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says about this program."""
        from moe_train.model.identity import identity

        model = self.config.model
        tokenizer = self.corpus.tokenizer
        return {
            "model": identity(model, padded_vocab(self.vocab, model.vocab_multiple)),
            "layout": self.layout.tag,
            "world": self.world,
            "seed": self.config.run.seed,
            "tokenizer": tokenizer.fingerprint if tokenizer else "unknown",
        }


def open_session(
    config: Config,
    layout: Layout,
    rank: int,
    world: int,
    stack: ExitStack,
    *,
    folder: RunFolder | None = None,
    fault: MoeTrainError | None = None,
    joined: Callable[[Path], None] | None = None,
) -> Session:
    """Check the data, join the world and build the model; ``stack`` closes what is opened.

    Args:
        folder: the run folder, on rank 0; the others are told.
        fault: why this rank cannot go on; its peers are told before it is raised everywhere.
        joined: called with the run folder's logs, once all ranks know of them.

    Raises:
        MoeTrainError: this rank's fault or a peer's; see the rooms.
    """
    backend = select_backend(config.device, config.backend)
    log_to_file(folder.rank_log(0) if folder else None)
    if folder is not None:
        clear(folder.logs)
    corpus, vocab = None, 0
    if fault is None:
        try:
            corpus = open_corpus(config.data, backend.prepare)
            vocab = config.model.vocab or corpus.vocab_size
            corpus.check_vocabulary(vocab)
        except MoeTrainError as unusable:
            fault = unusable
    if fault is not None and world == 1:
        raise fault
    try:
        backend.prepare()
    except MoeTrainError as unusable:
        # The peers are on their way into the world: they are told there.
        fault = fault or unusable
        if world == 1:
            raise
    path = _join(config, backend, rank, world, stack, fault, folder.path if folder else None)
    assert corpus is not None
    folder = RunFolder(path) if path else None
    log_to_file(folder.rank_log(rank) if folder else None)
    if folder is not None and joined is not None:
        joined(folder.logs)
    engine = _build(config, layout, backend, vocab)
    # Only now: it imports Megatron, which the backend had to prepare for.
    from moe_train.train.engine import release

    stack.callback(release, engine)
    return Session(config, layout, rank, world, corpus, vocab, engine, folder)


def _join(
    config: Config,
    backend: Backend,
    rank: int,
    world: int,
    stack: ExitStack,
    fault: MoeTrainError | None,
    path: Path | None,
) -> Path | None:
    """Open the world; returns rank 0's ``path`` unless a rank has a fault."""
    from moe_train.backend.groups import close_world, open_world
    from moe_train.run.broadcast import agree, same_kernels

    # The watchdog speaks first; a collective that gives up by itself names nobody.
    open_world(backend, rank, world, 2 * config.backend.timeout_seconds)

    def close(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # Peers of a rank that fails alone may never come to the end that a graceful close awaits.
        close_world(abort=error is not None and not isinstance(error, together))

    together = (NonFiniteError, Preempted)
    stack.push(close)
    path = agree(fault, path)
    same_kernels(backend.kernels)
    return path


def _build(config: Config, layout: Layout, backend: Backend, vocab: int) -> Engine:
    from moe_train.backend.groups import open_groups
    from moe_train.train.engine import build_engine

    groups = open_groups(
        layout,
        timeout_seconds=2 * config.backend.timeout_seconds,
        nccl=config.backend.nccl_groups if backend.communication == "nccl" else {},
    )
    return build_engine(
        config,
        backend,
        groups,
        vocab=vocab,
        microbatches=microbatches_per_step(config, layout.data),
    )

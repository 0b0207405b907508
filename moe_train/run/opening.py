"""Open a session for training or evaluation: data, process groups, model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_train.backend.select import select_backend
from moe_train.data.corpus import open_corpus
from moe_train.errors import MoeTrainError, NonFiniteError, Preempted
from moe_train.run.failure import clear
from moe_train.run.logs import log_to_file
from moe_train.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config
    from moe_train.config.training import DataConfig
    from moe_train.data.corpus import Corpus
    from moe_train.parallel.layout import Layout
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.train.engine import Engine


@dataclass
class Session:
    """What a rank has open: its resolved run, data, engine and run folder."""

    run: ResolvedRun
    """With the vocabulary of the data and the name of the run folder."""
    rank: int
    corpus: Corpus
    engine: Engine
    folder: RunFolder | None
    """The run folder, the same on every rank; None without training."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.run.config

    @property
    def layout(self) -> Layout:
        """The run's layout."""
        return self.run.layout

    @property
    def modules(self) -> list[Any]:
        """The model's chunks on this rank, without their wrappers."""
        from moe_train.model.build import unwrap

        return [unwrap(chunk) for chunk in self.engine.chunks]

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of a checkpoint's manifest that describe this session."""
        from moe_train.checkpoint.manifest import identity

        run = self.run
        tokenizer = self.corpus.tokenizer
        return {
            "model": identity(run.config.model, run.padded_vocab),
            "layout": run.layout.tag,
            "world": run.layout.world,
            "seed": run.config.run.seed,
            "tokenizer": tokenizer.fingerprint if tokenizer else "unknown",
        }


def open_session(
    run: ResolvedRun,
    rank: int,
    stack: ExitStack,
    *,
    folder: RunFolder | None = None,
    fault: MoeTrainError | None = None,
    joined: Callable[[Path], None] | None = None,
    read: Callable[[DataConfig, Callable[[], None]], Corpus] = open_corpus,
    build: Callable[[ResolvedRun, Backend, Any], Engine] | None = None,
) -> Session:
    """Open the data and the process groups and build the model; ``stack`` closes them.

    Args:
        folder: the run folder, on rank 0, which broadcasts it.
        fault: an earlier error of this rank, to be raised on all ranks.
        joined: called with the folder of logs, once all ranks know it.
        read: opens the data, or only their tokenizer.
        build: `build_engine`, with arguments of its own where given.

    Raises:
        MoeTrainError: this rank's fault or a peer's, the same on every rank.
    """
    config, world = run.config, run.layout.world
    backend = select_backend(config.device, config.backend)
    log_to_file(folder.rank_log(0) if folder else None)
    if folder is not None:
        clear(folder.logs)
    corpus = None
    if fault is None:
        try:
            corpus = read(config.data, backend.prepare)
            run = run.with_vocabulary(config.model.vocab or corpus.vocab_size, "data")
            corpus.check_vocabulary(run.vocab)
        except MoeTrainError as unusable:
            fault = unusable
    if fault is not None and world == 1:
        raise fault
    try:
        backend.prepare()
    except MoeTrainError as unusable:
        # The peers are about to open the world: _join raises it on all ranks.
        fault = fault or unusable
        if world == 1:
            raise
    path = _join(config, backend, rank, world, stack, fault, folder.path if folder else None)
    assert corpus is not None
    folder = RunFolder(path) if path else None
    log_to_file(folder.rank_log(rank) if folder else None)
    if folder is not None and joined is not None:
        joined(folder.logs)
    # They import Megatron, which must come after the backend's preparation.
    from moe_train.backend.groups import open_groups
    from moe_train.train.engine import build_engine, release

    if folder is not None:
        run = run.with_name(folder.path.name)
    groups = open_groups(
        run.layout,
        timeout_seconds=config.backend.collective_seconds,
        nccl=config.backend.nccl_groups if backend.communication == "nccl" else {},
    )
    engine = (build or build_engine)(run, backend, groups)
    stack.callback(release, engine)
    return Session(run, rank, corpus, engine, folder)


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
    from moe_train.run.broadcast import broadcast_or_raise, check_same_kernels

    open_world(backend, rank, world, config.backend.collective_seconds)

    def close(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # A graceful close waits for peers, which may hang if this rank alone has failed.
        close_world(abort=error is not None and not isinstance(error, on_all_ranks))

    on_all_ranks = (NonFiniteError, Preempted)
    stack.push(close)
    path = broadcast_or_raise(fault, path)
    check_same_kernels(backend.kernels)
    return path

"""The inside of a run, once the plan stands: machine, data, model, checkpoint, loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.backend.select import select_backend
from moe_train.data.blend import open_corpus
from moe_train.monitor.rank_log import log_to_file
from moe_train.monitor.run_folder import RunFolder
from moe_train.plan.batch import microbatches_per_step, sequences_per_step
from moe_train.plan.parameters import padded_vocab

if TYPE_CHECKING:
    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config
    from moe_train.data.blend import Corpus
    from moe_train.monitor.recorder import Recorder
    from moe_train.plan.layout import Layout
    from moe_train.train.engine import Engine


def train_session(
    config: Config,
    layout: Layout,
    rank: int,
    world: int,
    folder: RunFolder | None,
    stack: ExitStack,
    begun: float,
    reached: list[int],
) -> None:
    """Train; every resource is closed by ``stack``.

    Args:
        folder: the run folder, on rank 0; the others are told.
        begun: ``perf_counter`` at the start of the process.
        reached: its first item is kept at the number of completed steps.

    Raises:
        MoeTrainError: see the rooms.
    """
    corpus = open_corpus(config.data)
    vocab = config.model.vocab or corpus.vocab_size
    corpus.check_vocabulary(vocab)
    backend = select_backend(config.device, config.backend)
    log_to_file(folder.rank_log(0) if folder else None)
    backend.prepare()
    engine, folder = open_engine(config, layout, backend, rank, world, vocab, folder, stack)

    from moe_train.checkpoint.save import save_checkpoint
    from moe_train.data.batches import BatchSource
    from moe_train.data.datasets import build_datasets
    from moe_train.monitor.recorder import Silent
    from moe_train.train.interrupt import Interrupt
    from moe_train.train.loop import Intervals, run_loop

    batch = sequences_per_step(config, layout.data)
    facts = checkpoint_facts(config, layout, corpus, world, vocab)
    start, consumed = resume(config, folder, engine, facts, stack, rank)
    validates = config.train.eval_every > 0
    datasets = build_datasets(
        config.data,
        sequence=config.data.sequence,
        seed=config.run.seed,
        train_samples=consumed + max(1, config.train.steps - start) * batch,
        valid_samples=config.train.eval_batches * batch if validates else 0,
        vocab_limit=vocab,
        corpus=corpus,
    )
    data_rank, data_size = engine.groups.dp.rank(), engine.groups.dp.size()
    source = BatchSource(
        datasets.train, batch, config.batch.micro, data_rank, data_size, consumed
    )

    def validation() -> list[Any]:
        same = BatchSource(datasets.valid, batch, config.batch.micro, data_rank, data_size)
        return [same.next_step() for _ in range(config.train.eval_batches)]

    def save(step: int) -> None:
        save_checkpoint(
            folder.checkpoints,
            step=step,
            chunks=[chunk.module for chunk in engine.chunks],
            optimizer=engine.optimizer,
            keep=config.checkpoint.keep,
            facts=facts
            | {
                "consumed_samples": source.consumed,
                "consumed_tokens": source.consumed * config.data.sequence,
            },
        )

    recorder = (
        open_recorder(config, folder, datasets, batch, start, world, vocab, stack)
        if rank == 0
        else None
    )
    listener = Reached(recorder or Silent(), reached)
    reached[0] = start
    with Interrupt() as interrupt:
        run_loop(
            engine,
            source,
            validation,
            start=start,
            intervals=Intervals(
                config.train.steps, config.train.eval_every, config.checkpoint.every
            ),
            tokens_per_step=batch * config.data.sequence,
            listener=listener,
            save=save,
            interrupt=interrupt,
        )
    if recorder is not None:
        finish(recorder, folder, time.perf_counter() - begun)


class Reached:
    """Passes everything on and remembers the last completed step."""

    def __init__(self, listener: Any, reached: list[int]) -> None:
        self._listener, self._reached = listener, reached

    def on_step(self, record: dict[str, Any], result: Any) -> None:
        """A training step is done."""
        self._listener.on_step(record, result)
        self._reached[0] = record["step"]

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""
        self._listener.on_validation(record)


def open_engine(
    config: Config,
    layout: Layout,
    backend: Backend,
    rank: int,
    world: int,
    vocab: int,
    folder: RunFolder | None,
    stack: ExitStack,
) -> tuple[Engine, RunFolder]:
    """Join the world, learn the run folder from rank 0, build model and optimizer."""
    import torch.distributed as dist

    from moe_train.backend.groups import close_world, open_groups, open_world
    from moe_train.train.engine import build_engine

    timeout = config.backend.timeout_seconds
    open_world(backend, rank, world, timeout)
    stack.callback(close_world)
    told: list[Any] = [folder.path if folder else None]
    dist.broadcast_object_list(told, src=0)
    folder = RunFolder(told[0])
    log_to_file(folder.rank_log(rank))
    groups = open_groups(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        timeout_seconds=timeout,
        gloo=backend.name != "host",
    )
    engine = build_engine(
        config,
        backend,
        groups,
        vocab=vocab,
        microbatches=microbatches_per_step(config, layout.data),
    )
    return engine, folder


def checkpoint_facts(
    config: Config, layout: Layout, corpus: Corpus, world: int, vocab: int
) -> dict[str, Any]:
    """What a checkpoint's manifest says about the run."""
    from moe_train.model.identity import identity

    return {
        "model": identity(config.model, padded_vocab(vocab, config.model.vocab_multiple)),
        "layout": layout.tag,
        "world": world,
        "seed": config.run.seed,
        "tokenizer": corpus.tokenizer.fingerprint if corpus.tokenizer else "unknown",
    }


def resume(
    config: Config,
    folder: RunFolder,
    engine: Engine,
    facts: dict[str, Any],
    stack: ExitStack,
    rank: int,
) -> tuple[int, int]:
    """Load what ``checkpoint.resume`` asks for; returns (completed steps, consumed samples).

    Raises:
        CheckpointError: damaged, or of another model.
    """
    import torch.distributed as dist

    from moe_train.checkpoint.load import check_fits, find_checkpoint, load_checkpoint
    from moe_train.errors import CheckpointError

    choice: list[Any] = [None, None]
    if rank == 0:
        try:
            found, warnings = find_checkpoint(folder.checkpoints, config.checkpoint.resume)
            for warning in warnings:
                print(f"warning: passed over a damaged checkpoint: {warning}", flush=True)
            choice[0] = found
        except CheckpointError as fault:
            choice[1] = (fault.field, fault.problem, fault.fix)
    dist.broadcast_object_list(choice, src=0)
    if choice[1] is not None:
        raise CheckpointError(*choice[1])
    found = choice[0]
    if found is None:
        return 0, 0
    manifest = check_fits(Path(found), facts["model"])
    restored = load_checkpoint(
        Path(found),
        manifest,
        chunks=[chunk.module for chunk in engine.chunks],
        optimizer=engine.optimizer,
        layout=facts["layout"],
    )
    if rank == 0:
        moved = "" if restored else f" (written in layout {manifest.layout})"
        print(f"resumed {found} at step {manifest.step}{moved}", flush=True)
    return manifest.step, manifest.consumed_samples


def open_recorder(
    config: Config,
    folder: RunFolder,
    datasets: Any,
    batch: int,
    start: int,
    world: int,
    vocab: int,
    stack: ExitStack,
) -> Recorder:
    """Metrics, console and mirror of rank 0."""
    from moe_train.config.convert import to_mapping
    from moe_train.data.entropy import dataset_entropy
    from moe_train.monitor.flops import flops_per_token
    from moe_train.monitor.metrics import MetricsLog
    from moe_train.monitor.mirror import Mirror
    from moe_train.monitor.progress import ConsoleProgress
    from moe_train.monitor.recorder import Recorder

    log = stack.enter_context(MetricsLog(folder.metrics))
    log.truncate_after(start)
    progress = ConsoleProgress(config.log.console, config.train.log_every)
    stack.callback(progress.finish)
    mirror = Mirror(
        config.log.wandb,
        project=config.log.wandb_project,
        name=folder.path.name,
        folder=folder.wandb,
        config=to_mapping(config),
        warn=progress.message,
        log=folder.logs / "wandb.log",
    )
    stack.callback(mirror.finish, timeout=10.0)
    entropy = None
    if datasets.valid is not None:
        entropy = dataset_entropy(datasets.valid, config.train.eval_batches * batch)
    progress.start(config.train.steps, start)
    return Recorder(
        folder,
        log,
        progress,
        mirror,
        flops_per_token=flops_per_token(config.model, config.data.sequence, vocab).total,
        peak_flops=config.hardware.peak_tflops.get(config.dtype, 0.0) * 1e12 * world,
        unigram_entropy=entropy,
    )


def finish(recorder: Recorder, folder: RunFolder, seconds: float) -> None:
    """Write the finished status and show the summary (rank 0)."""
    from dataclasses import asdict

    from moe_train.monitor.metrics import read
    from moe_train.monitor.status import write_status
    from moe_train.monitor.summary import summarise

    records = read(folder.metrics)
    entropy = next((r["unigram_entropy"] for r in records if "unigram_entropy" in r), None)
    summary = summarise(
        records,
        state="finished",
        wall_seconds=seconds,
        run_folder=folder.path,
        unigram_entropy=entropy,
    )
    write_status(folder.status, "finished", summary.step)
    recorder.mirror.summary({k: v for k, v in asdict(summary).items() if k != "run_folder"})
    recorder.progress.finish(summary)

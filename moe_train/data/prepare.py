"""Turns text, jsonl and parquet into a Megatron indexed dataset, resumably."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from moe_train.data import tokenizer as tokenizers
from moe_train.data.cache import lock
from moe_train.data.encode import Encoder, Encoding, End, encode_all, text_of
from moe_train.data.manifest import Manifest, dataset_file
from moe_train.data.shards import Shard, ShardFolder, ShardWriter
from moe_train.data.sources import Source, expand, read
from moe_train.data.statistics import count_tokens, entropy_of_counts
from moe_train.data.verify import block_digests, check_files
from moe_train.errors import DataError
from moe_train.files import file_digest, json_digest, write_json

OUTPUTS = (".json", ".bin", ".idx", ".tokenizer.json")
"""What a preparation leaves; the manifest is first removed and last written."""


@dataclass(frozen=True)
class Request:
    """One preparation."""

    sources: tuple[Path, ...]
    output: Path
    """Prefix of the files to write."""
    tokenizer: str = "byte"
    """byte | bpe:VOCAB (trained on the sources) | a tokenizer.json file."""
    eod_name: str | None = None
    append_eod: bool = True
    text_key: str = "text"
    workers: int = 1
    overwrite: bool = False
    bpe_bytes: int = 256 * 1024 * 1024
    """Text that bpe is trained on at most, from the beginning."""


@dataclass
class Progress:
    """How far a preparation is."""

    files: int
    done: int = 0
    resumed: int = 0
    documents: int = 0
    tokens: int = 0
    stage: str = "tokenize"


Report = Callable[[Progress], None]


def prepare(request: Request, report: Report | None = None) -> Manifest:
    """Prepare a dataset; a killed run is continued by calling it again.

    The files depend on the sources and the tokenizer only, not on the number of workers
    or on interruptions.

    Args:
        request: what to prepare.
        report: called after every batch and file.

    Raises:
        DataError: bad input (file and line), an output that exists or cannot be written.
    """
    output = request.output
    targets = [dataset_file(output, ending) for ending in OUTPUTS]
    existing = [path for path in targets if path.exists()]
    if existing and not request.overwrite:
        raise DataError(str(existing[0]), "exists", "choose another --output or give --overwrite")
    sources = expand(request.sources)
    work = dataset_file(output, ".partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        fix = "choose an --output on a file system with locks"
        with lock(work / "prepare", timeout=0.0, field="--output", fix=fix):
            manifest = _prepare(request, sources, work, report or (lambda progress: None))
            shutil.rmtree(work)
    except Timeout as error:
        raise DataError(
            str(output), "is being prepared by another process", "wait for it to end"
        ) from error
    except OSError as error:
        raise DataError(
            str(error.filename or output),
            f"cannot be used: {error.strerror or error}",
            "free or choose another place, and run again: finished files are reused",
        ) from error
    return manifest


def _prepare(request: Request, sources: list[Source], work: Path, report: Report) -> Manifest:
    # Here and not above: the import takes seconds, and bad input is refused without it.
    from megatron.core.datasets.indexed_dataset import DType

    progress = Progress(len(sources))
    if request.tokenizer.startswith("bpe:"):
        progress.stage = "train tokenizer"
        report(progress)
    spec = _tokenizer(request, sources, work)
    encoding = Encoding(spec, request.eod_name, request.append_eod, request.text_key)
    tokenizer = Encoder(encoding).tokenizer
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    settings = json_digest(
        [tokenizer.fingerprint, tokenizer.eod, request.append_eod, request.text_key, dtype.__name__]
    )
    folder = ShardFolder(work / "shards", settings, dtype)
    progress.stage = "tokenize"
    shards = _shards(request, sources, encoding, folder, progress, report)
    progress.stage = "merge"
    report(progress)
    documents = sum(shard.documents for shard in shards)
    if documents == 0:
        raise DataError(
            ", ".join(map(str, request.sources)), "holds no text: empty corpus", "give other input"
        )
    merged = work / "merged"
    full = [folder.prefix(s) for s, shard in zip(sources, shards, strict=True) if shard.documents]
    _merge(merged, full, dtype)
    counts = count_tokens(_tokens(dataset_file(merged, ".bin"), dtype))
    whole, blocks = block_digests(dataset_file(merged, ".bin"))
    manifest = Manifest(
        documents=documents,
        tokens=int(counts.sum()),
        skipped_documents=sum(shard.skipped for shard in shards),
        vocab_size=tokenizer.vocab_size,
        max_token_id=counts.size - 1,
        dtype=dtype.__name__,
        eod=tokenizer.eod,
        appended_eod=request.append_eod,
        tokenizer="byte" if spec == "byte" else "file",
        tokenizer_fingerprint=tokenizer.fingerprint,
        unigram_entropy=entropy_of_counts(counts),
        bin_bytes=dataset_file(merged, ".bin").stat().st_size,
        bin_sha256=whole,
        bin_blocks=blocks,
        idx_bytes=dataset_file(merged, ".idx").stat().st_size,
        idx_sha256=file_digest(dataset_file(merged, ".idx")),
        sources=[
            {
                "path": shard.path,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "documents": shard.documents,
                "tokens": shard.tokens,
            }
            for shard in shards
        ],
    )
    if isinstance(tokenizer, tokenizers.FileTokenizer):
        dataset_file(merged, ".tokenizer.json").write_text(tokenizer.source, encoding="utf-8")
    manifest.write(dataset_file(merged, ".json"))
    _publish(merged, request.output)
    return manifest


def _tokenizer(request: Request, sources: list[Source], work: Path) -> str:
    """Specification of the tokenizer to use, after training it for bpe:VOCAB."""
    if not request.tokenizer.startswith("bpe:"):
        return request.tokenizer
    size = request.tokenizer.removeprefix("bpe:")
    if not size.isdecimal():
        raise DataError("--tokenizer", f"{request.tokenizer!r} has no size", "such as bpe:4096")
    stats = [(str(s.path), s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in sources]
    wanted = json_digest([size, request.bpe_bytes, request.text_key, stats])
    trained, marker = work / "tokenizer.json", work / "tokenizer.done"
    if not (marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == wanted):
        marker.unlink(missing_ok=True)
        texts = _texts(sources, request)
        first = next(texts, None)
        if first is None:
            raise DataError(
                ", ".join(map(str, request.sources)), "holds no text: empty corpus", "other input"
            )
        content = tokenizers.train_bpe(chain([first], texts), int(size))
        trained.write_text(content, encoding="utf-8")
        write_json(marker, wanted)
    return str(trained)


def _texts(sources: list[Source], request: Request) -> Iterator[str]:
    """Texts to train a tokenizer on, up to the request's limit."""
    encoding = Encoding("byte", text_key=request.text_key)
    left = request.bpe_bytes
    for source in sources:
        for raw in read(source, request.text_key):
            text = text_of(source.path, source.kind, raw, encoding)
            if text:
                yield text
            left -= len(text.encode("utf-8"))
            if left <= 0:
                return


def _shards(
    request: Request,
    sources: list[Source],
    encoding: Encoding,
    folder: ShardFolder,
    progress: Progress,
    report: Report,
) -> list[Shard]:
    """Finished shards of all sources, in their order."""
    finished = {source: shard for source in sources if (shard := folder.find(source)) is not None}
    progress.done = progress.resumed = len(finished)
    progress.documents = sum(shard.documents for shard in finished.values())
    progress.tokens = sum(shard.tokens for shard in finished.values())
    report(progress)
    writer: ShardWriter | None = None
    left = [source for source in sources if source not in finished]
    results = encode_all(left, encoding, request.workers)
    try:
        for source, result in results:
            writer = writer or folder.writer(source)
            if isinstance(result, End):
                finished[source] = writer.finish()
                writer = None
                progress.done += 1
            else:
                writer.add(result)
                progress.documents += result.lengths.size
                progress.tokens += result.tokens.size
            report(progress)
    finally:
        results.close()
        if writer is not None:
            writer.close()
    return [finished[source] for source in sources]


def _merge(merged: Path, shards: list[Path], dtype: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(dataset_file(merged, ".bin")), dtype=dtype)
    for shard in shards:
        # Not the builder's add_index: it runs a full garbage collection for every shard.
        lengths = check_files(shard).lengths.tolist()
        first = len(builder.sequence_lengths) + 1
        builder.sequence_lengths.extend(lengths)
        builder.document_indices.extend(range(first, first + len(lengths)))
        with dataset_file(shard, ".bin").open("rb") as stream:
            shutil.copyfileobj(stream, builder.data_file)
    builder.finalize(str(dataset_file(merged, ".idx")))


def _tokens(path: Path, dtype: Any, chunk: int = 1 << 22) -> Iterator[Any]:
    with path.open("rb") as stream:
        while data := stream.read(chunk * np.dtype(dtype).itemsize):
            yield np.frombuffer(data, dtype)


def _publish(merged: Path, output: Path) -> None:
    """Move the finished files to their names, the manifest last."""
    for ending in OUTPUTS:
        dataset_file(output, ending).unlink(missing_ok=True)
    for ending in reversed(OUTPUTS):
        if dataset_file(merged, ending).exists():
            os.replace(dataset_file(merged, ending), dataset_file(output, ending))

"""The unfinished work of a preparation: one shard per input file, each with a done-marker.

A shard counts only if its marker matches the input file and everything that decides the
tokens, so a killed preparation continues where it stopped and no stale shard is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_train.data.encode import Encoded
from moe_train.data.sources import Source
from moe_train.errors import DataError
from moe_train.files import file_digest, json_digest, write_json


@dataclass(frozen=True)
class Shard:
    """A finished shard and the input that it came from."""

    settings: str
    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    documents: int
    tokens: int
    skipped: int
    bin_sha256: str
    idx_sha256: str


class ShardFolder:
    """Finished and unfinished shards of one preparation.

    Args:
        folder: where the shards live.
        settings: digest of everything but the input that decides the tokens.
        dtype: numpy scalar type of the ids.
    """

    def __init__(self, folder: Path, settings: str, dtype: Any) -> None:
        self.folder, self.settings, self.dtype = folder, settings, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def prefix(self, source: Source) -> Path:
        """Prefix of the shard's .bin, .idx and .done."""
        return self.folder / hashlib.sha256(str(source.path).encode()).hexdigest()[:20]

    def find(self, source: Source) -> Shard | None:
        """The finished shard of a source, if it is still valid for that source."""
        prefix = self.prefix(source)
        try:
            content = json.loads(prefix.with_suffix(".done").read_text(encoding="utf-8"))
            if content.pop("check") != json_digest(content):
                return None
            shard = Shard(**content)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None
        now = source.path.stat()
        if (shard.settings, shard.bytes) != (self.settings, now.st_size):
            return None
        if not self._as_written(prefix, shard):
            return None
        if shard.mtime_ns != now.st_mtime_ns and shard.sha256 != file_digest(source.path):
            return None
        return shard

    def _as_written(self, prefix: Path, shard: Shard) -> bool:
        """Whether the shard's files are what was finished: they may have waited for days."""
        written = {".bin": shard.bin_sha256, ".idx": shard.idx_sha256}
        try:
            return all(
                file_digest(prefix.with_suffix(e)) == sha256 for e, sha256 in written.items()
            )
        except OSError:
            return False

    def writer(self, source: Source) -> ShardWriter:
        """Start a shard from its beginning."""
        return ShardWriter(self, source)


class ShardWriter:
    """Writes one shard; it exists for others only after `finish`."""

    def __init__(self, folder: ShardFolder, source: Source) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.folder, self.source = folder, source
        self.prefix = folder.prefix(source)
        self.prefix.with_suffix(".done").unlink(missing_ok=True)
        self.before = source.path.stat()
        self.documents = self.tokens = self.skipped = 0
        self.builder = IndexedDatasetBuilder(
            str(self.prefix.with_suffix(".bin")), dtype=folder.dtype
        )

    def add(self, encoded: Encoded) -> None:
        """Append the documents of a batch."""
        start = 0
        for length in encoded.lengths.tolist():
            self.builder.add_document(encoded.tokens[start : start + length], [length])
            start += length
        self.documents += encoded.lengths.size
        self.tokens += encoded.tokens.size
        self.skipped += encoded.skipped

    def finish(self) -> Shard:
        """Write the index, then the marker.

        Raises:
            DataError: the input file changed while it was read.
        """
        self.builder.finalize(str(self.prefix.with_suffix(".idx")))
        sha256 = file_digest(self.source.path)
        after = self.source.path.stat()
        if (after.st_size, after.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns):
            raise DataError(
                str(self.source.path), "changed while it was read", "run again when it is at rest"
            )
        shard = Shard(
            settings=self.folder.settings,
            path=str(self.source.path),
            bytes=after.st_size,
            mtime_ns=after.st_mtime_ns,
            sha256=sha256,
            documents=self.documents,
            tokens=self.tokens,
            skipped=self.skipped,
            bin_sha256=file_digest(self.prefix.with_suffix(".bin")),
            idx_sha256=file_digest(self.prefix.with_suffix(".idx")),
        )
        content = asdict(shard)
        write_json(self.prefix.with_suffix(".done"), content | {"check": json_digest(content)})
        return shard

    def close(self) -> None:
        """Close an unfinished shard's file."""
        self.builder.data_file.close()

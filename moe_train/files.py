"""JSON files, read with a size limit and validated, written atomically; digests; lock files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from moe_train.errors import MoeTrainError

type Count = Annotated[int, Field(ge=0, lt=2**63)]


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text` (UTF-8): readers see the old content or the new.

    Args:
        durable: wait until the text is on the disk, so that this holds after a power failure too;
            a process that is killed needs no waiting.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then untouched.
    """
    # The process id keeps two writers of one path from sharing a temporary file.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Write `content` as indented JSON with :func:`write_atomically`."""
    write_atomically(path, json.dumps(content, indent=2) + "\n", durable=durable)


def json_digest(content: Any) -> str:
    """SHA-256 of `content` as JSON, whatever the order of its keys; hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_validated[T](
    path: Path,
    schema: type[T],
    *,
    limit: int,
    what: str,
    error: type[MoeTrainError],
    fix: str,
    follow_links: bool = False,
) -> T:
    """Content of a JSON file that may be damaged or hostile, checked against ``schema``.

    Args:
        schema: a class that pydantic can validate; strict and without extra fields if it says so.
        limit: bytes that the file may have.
        what: what it should be, for the message, such as ``a manifest of format 1``.
        error: the error to raise.
        follow_links: accept a link; one inside a folder of others could lead out of it.

    Raises:
        MoeTrainError: ``error``: no plain file, too large, not JSON, or not of the schema.
    """
    try:
        status = path.stat(follow_symlinks=follow_links)
        # A pipe or a device would never end.
        if not stat.S_ISREG(status.st_mode):
            raise error(str(path), "is not a plain file", fix)
        if status.st_size > limit:
            raise error(str(path), f"has {status.st_size} bytes, more than {limit}", fix)
        return TypeAdapter(schema).validate_json(path.read_bytes())
    except OSError as problem:
        raise error(str(path), f"cannot be read: {problem}", fix) from problem
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        reason = first["msg"].removeprefix("Value error, ")[:300]
        if first["type"] == "json_invalid":
            raise error(str(path), f"cannot be read: {reason}", fix) from problem
        if place := ".".join(map(str, first["loc"]))[:100]:
            reason = f"{place!r}: {reason}"
        raise error(str(path), f"is not {what}: {reason}", fix) from problem


def kernel_lock(path: Path, timeout: float) -> FileLock:
    """Lock by flock alone: the kernel releases it with its process, however that ends.

    filelock's fallback where there is no flock is a marker file, which outlives a killed job.

    Args:
        timeout: seconds that ``acquire()`` waits for another holder; negative: for ever.

    Returns:
        A lock whose ``acquire()`` raises OSError or NotImplementedError where the file cannot be
        opened or its file system has no locks.
    """
    try:
        return FileLock(path, timeout=timeout, fallback_to_soft=False)
    except TypeError:
        # Before filelock 4.2 there is no fallback, and no such argument.
        return FileLock(path, timeout=timeout)

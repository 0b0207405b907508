"""Logging of a rank: everything to ``logs/rank_K.log``, rank 0's own short lines to the console.

Modules log to ``logging.getLogger(__name__)``. Messages and warnings of libraries go to the file
alone, except errors. ``extra=FILE_ONLY`` keeps a record of ours off the console.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

FORMAT = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"
FILE_ONLY = {"console": False}
"""For a logging call's ``extra``."""
_BUFFERED = 1000
"""Records kept while the run folder is not known yet."""


class ConsoleHandler(logging.Handler):
    """Rank 0's messages on stdout, errors of any rank on stderr."""

    def __init__(self, rank: str) -> None:
        super().__init__()
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of this package; of a library only an error."""
        if not getattr(record, "console", True):
            return
        ours = record.name.partition(".")[0] == "moe_train"
        if record.levelno >= logging.ERROR:
            message = f"moe_train: {record.getMessage()}" if ours else self.format(record)
            print(message, file=sys.stderr, flush=True)
        elif ours and self._rank == "0" and record.levelno >= logging.INFO:
            prefix = "warning: " * (record.levelno == logging.WARNING)
            print(prefix + record.getMessage(), flush=True)


@contextmanager
def logging_to_console() -> Iterator[None]:
    """Configure logging of this process: console, and memory until :func:`log_to_file`."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(True)
            root.handlers = [ConsoleHandler(_rank())]
            root.setLevel(logging.INFO)
            log_to_file(None)
            yield
    finally:
        log_to_file(None)
        logging.captureWarnings(False)
        root.handlers = before
        root.setLevel(level)


def log_to_file(path: Path | None) -> None:
    """Send log records and warnings of this process to ``path``.

    None keeps them in memory, for the file that a later call names. Call it again after importing
    torch, which gives its loggers console handlers of their own.
    """
    root = logging.getLogger()
    target: logging.Handler = MemoryHandler(_BUFFERED, logging.CRITICAL + 1)
    if path is not None:
        target = logging.FileHandler(path)
        target.setFormatter(logging.Formatter(FORMAT, defaults={"rank": _rank()}))
    for handler in root.handlers[:]:
        if isinstance(handler, MemoryHandler):
            for record in handler.buffer:
                target.handle(record)
            handler.buffer.clear()
        if isinstance(handler, MemoryHandler | logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    root.addHandler(target)
    consoles = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            if getattr(handler, "stream", None) in consoles:
                logger.removeHandler(handler)
                logger.propagate = True


def _rank() -> str:
    return os.environ.get("RANK", "0")

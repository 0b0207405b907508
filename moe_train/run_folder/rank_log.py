"""Each rank's library messages go to its own file, so that the console stays readable."""

from __future__ import annotations

import logging
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
KEPT = 1000
"""Messages remembered while the file is not known yet."""
NEVER_FLUSH = logging.CRITICAL + 1


def log_to_file(path: Path | None) -> None:
    """Send Python logging and warnings of this process to ``path``.

    None keeps them in memory, for the file that a later call names. Errors of libraries still
    reach standard error. Call it after importing torch, which gives its loggers consoles of
    their own.
    """
    root = logging.getLogger()
    kept: list[logging.LogRecord] = []
    for handler in list(root.handlers):
        if isinstance(handler, MemoryHandler):
            kept += handler.buffer
            handler.buffer.clear()
        root.removeHandler(handler)
        handler.close()
    target: logging.Handler
    if path is None:
        target = MemoryHandler(KEPT, NEVER_FLUSH)
    else:
        target = logging.FileHandler(path)
        target.setFormatter(logging.Formatter(FORMAT))
    for record in kept:
        target.handle(record)
    console = logging.StreamHandler()
    console.setLevel(logging.ERROR)
    root.addHandler(target)
    root.addHandler(console)
    root.setLevel(logging.INFO)
    _take_consoles()
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def _take_consoles() -> None:
    """Let libraries that log to the terminal themselves log through the root."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            stream = getattr(handler, "stream", None)
            if stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__):
                logger.removeHandler(handler)
                logger.propagate = True

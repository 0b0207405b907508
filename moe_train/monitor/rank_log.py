"""Each rank's library messages go to its own file, so that the console stays readable."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path


def log_to_file(path: Path | None) -> None:
    """Send Python logging and warnings of this process to ``path``, or nowhere for None.

    Errors of libraries still reach standard error.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    target: logging.Handler = logging.NullHandler() if path is None else logging.FileHandler(path)
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler()
    console.setLevel(logging.ERROR)
    root.addHandler(target)
    root.addHandler(console)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")

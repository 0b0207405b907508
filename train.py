"""Train: ``python train.py [overrides]``, or the same under ``torchrun --nproc-per-node N``."""

from __future__ import annotations

import sys

if sys.version_info < (3, 12):  # noqa: UP036  this file is what an old interpreter can read
    sys.exit("train.py needs Python 3.12 or newer: `make setup`, then `. .venv/bin/activate`")

from moe_train.run.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Train: ``python train.py [overrides]``, or the same under ``torchrun --nproc-per-node N``."""

from __future__ import annotations

import sys

from moe_train.runtime import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

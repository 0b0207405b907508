"""Train: ``python train.py [overrides]`` or ``torchrun --nproc-per-node N train.py [overrides]``."""

from __future__ import annotations

import sys

from moe_train.runtime import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

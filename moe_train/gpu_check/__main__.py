"""``python -m moe_train.gpu_check [--checks a,b] [--out DIR] [--device auto|cpu]``."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  this file is what an old interpreter can read
    sys.exit("moe_train.gpu_check needs Python 3.12 or newer")

from moe_train.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

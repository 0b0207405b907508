#!/usr/bin/env bash
# Runs the GPU checks with what is there: the project's own environment if it was made, else a
# Python of the PATH, whose packages may come by PYTHONPATH. Nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The finder of `make setup` comes last: it knows pyenv and uv, and asks for more than is needed here.
found=$(launch/find_python.sh 2>/dev/null || true)
for python in "${PYTHON:-}" .venv/bin/python python3 python3.12 python3.13 python3.14 "$found"; do
  if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    exec env OMP_NUM_THREADS=1 "$python" -m moe_train.gpu_check "$@"
  fi
done
echo "No Python 3.12 or newer: neither .venv/bin/python nor one on PATH, under pyenv or uv; set PYTHON=/path/to/python3.12." >&2
exit 1

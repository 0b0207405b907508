#!/usr/bin/env bash
# Runs the GPU checks with the project's environment if it exists, else with a Python on PATH, whose
# packages may come from PYTHONPATH. Installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# find_python.sh comes last: it knows pyenv and uv, but requires more than the checks need.
found=$(launch/find_python.sh 2>/dev/null || true)
for python in "${PYTHON:-}" .venv/bin/python python3 python3.12 python3.13 python3.14 "$found"; do
  if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    exec env OMP_NUM_THREADS=1 "$python" -m moe_train.gpu_check "$@"
  fi
done
echo "No Python 3.12 or newer: neither .venv/bin/python nor one on PATH, under pyenv or uv; set PYTHON=/path/to/python3.12." >&2
exit 1

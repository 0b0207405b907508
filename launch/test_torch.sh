#!/usr/bin/env bash
# Runs the tests that stand on torch's kernels with another torch: launch/test_torch.sh 2.11
# Its environment is .venv-torch-<version>, installed the first time (2-3 GB) and when
# pyproject.toml or constraints.txt is newer. Everything but torch and what torch itself pins has
# the versions of constraints.txt. More arguments go to pytest.
set -euo pipefail
# A pattern below that matches no file is an error.
shopt -s failglob
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?usage: launch/test_torch.sh VERSION [pytest options]}
shift
home=.venv-torch-$version
stamp=$home/.installed
if [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  python=$(launch/find_python.sh)
  echo "[test-torch] creating $home with $("$python" --version) and torch $version"
  "$python" -m venv --clear "$home"
  grep -vE '^(torch|triton|setuptools|nvidia-|cuda-|transformer-engine)' constraints.txt \
    >"$home/constraints.txt"
  "$home/bin/python" -m pip --disable-pip-version-check --no-input install --quiet \
    --constraint "$home/constraints.txt" "torch==$version.*" --editable ".[dev]"
  touch "$stamp"
fi

tests=(
  tests/backend/test_kernels_*.py
  tests/convert/test_gradients.py
  tests/train/test_parity_small.py
  tests/model/test_span_gradients.py
  tests/train/test_recompute.py
  tests/checkpoint/test_resume_bitwise.py
  tests/backend/test_cpu_patches.py
  tests/backend/test_cpu_behaviour.py
)
OMP_NUM_THREADS=1 exec "$home/bin/python" -m pytest -q "${tests[@]}" "$@"

#!/usr/bin/env bash
# Prints the path of a Python that this project can run on; without one, an error message.
# Search order: $PYTHON, PATH, pyenv's versions, uv's managed Pythons.
set -euo pipefail

# What a candidate must have: the version range of pyproject.toml, and the modules that a virtual
# environment needs (Debian packages ensurepip apart; a Python built without libffi has no ctypes).
version_check='import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 15))'
module_check='import ctypes, ensurepip, ssl, venv'

candidates() {
  if [ -n "${PYTHON:-}" ]; then printf '%s\n' "$PYTHON"; fi
  local name
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -aP "$name" 2>/dev/null || true
  done
  local path
  for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[234]*/bin/python3; do
    if [ -x "$path" ]; then printf '%s\n' "$path"; fi
  done
  if command -v uv >/dev/null 2>&1; then
    uv python find --no-project '>=3.12,<3.15' 2>/dev/null || true
  fi
  for path in "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"/cpython-3.1[234]*/bin/python3; do
    if [ -x "$path" ]; then printf '%s\n' "$path"; fi
  done
}

incomplete=""
while IFS= read -r python; do
  # A pyenv shim also exists for versions that are not selected, and then fails: run it to know.
  "$python" -c "$version_check" >/dev/null 2>&1 || continue
  if "$python" -c "$module_check" >/dev/null 2>&1; then
    # The interpreter itself, so that a shim's later change does not matter.
    exec "$python" -c 'import sys; print(sys.executable)'
  fi
  incomplete="${incomplete:-$python}"
done < <(candidates)

if [ -n "$incomplete" ]; then
  echo "Python at $incomplete lacks ensurepip, venv, ssl or ctypes: install them (on Debian and Ubuntu: apt-get install python3-venv) or set PYTHON=/path/to/another/python3.12." >&2
else
  echo "No Python from 3.12 to 3.14 on PATH, under pyenv or under uv: install one (for example 'uv python install 3.12' or 'pyenv install 3.12') or set PYTHON=/path/to/python3.12." >&2
fi
exit 1

#!/usr/bin/env bash
# Creates .venv in the checkout and installs the project with its pinned versions.
# EXTRAS (default: dev) chooses the extras. EXTRAS=dev,gpu adds TransformerEngine, whose torch part
# is compiled here: that takes nvcc, CUDA and cuDNN headers, and some ten minutes.
# CUDA (12 or 13; default: what the driver runs) chooses the pinned set, see choose_cuda.sh.
# Safe to repeat: the stamp is written last, and `make` calls this only when it is outdated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*"; }

# Replace an environment that was moved or whose interpreter is gone.
if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
  python=$(launch/find_python.sh)
  say "creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

cuda=$(launch/choose_cuda.sh 2> >(sed 's/^/[setup] /' >&2))
constraints=constraints.txt
if [ "$cuda" = 12 ]; then constraints="constraints-cu12.txt"; fi
say "versions of $constraints"

say "installing torch, Megatron-Core and the rest (the first time: 2-3 GB, a few minutes)"
log=.venv/setup.log
started=$SECONDS
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)
# Progress: every tenth package; pip's whole output goes to the log.
progress() {
  local line count=0
  while IFS= read -r line; do
    case $line in
      Collecting\ *)
        count=$((count + 1))
        line=${line#Collecting } line=${line%% (from*}
        if [ $((count % 10)) -eq 1 ]; then say "  package $count: $line"; fi
        ;;
      Installing\ collected*) say "  unpacking $count packages" ;;
      "  Building wheel"*) say "  ${line#  }" ;;
    esac
  done
}
install() {
  if ! "${pip[@]}" install --progress-bar off --constraint "$constraints" "$@" 2>&1 |
    tee -a "$log" | progress; then
    say "pip failed; the end of $log:"
    tail -n 25 "$log"
    exit 1
  fi
}
: >"$log"
extras=,${EXTRAS:-dev},
install --editable ".[$(tr -s , <<<"${extras/,gpu,/,}" | sed 's/^,//; s/,$//')]"
if [[ $extras == *,gpu,* ]]; then
  say "compiling TransformerEngine against the torch just installed"
  install setuptools wheel ninja pybind11
  # TransformerEngine loads curand undeclared; only CUDA 12's torch brings it.
  if [ "$cuda" = 12 ]; then curand=nvidia-curand-cu12; else curand=nvidia-curand; fi
  install --no-build-isolation "transformer-engine[core_cu$cuda,pytorch]" "$curand"
fi
printf '%s\n' "$cuda" >.venv/.cuda
touch .venv/.installed
say "done in $((SECONDS - started)) s"

#!/usr/bin/env bash
# Builds TransformerEngine's torch extension from source, for checks of the CUDA model on machines
# without a GPU. It goes into an environment of its own, .cache/te/venv, which sees the packages of
# .venv: where TransformerEngine can be imported Megatron behaves differently, and CPU runs
# must not be affected.
# Prints the interpreter to use: .cache/te/python, which tells TransformerEngine where torch's CUDA
# libraries are. Exit code 3: this machine cannot build it, and the last line says why.
# MAX_JOBS (default 1): compilers at a time; one takes some 2 GB and twenty minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf '%s\n' "$*" >&2; exit 3; }

main=$PWD/.venv/bin/python
home=.cache/te
python=$PWD/$home/venv/bin/python
launcher=$PWD/$home/python
wanted=$("$main" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__)')
wanted="$wanted $(grep '^transformer-engine-torch==' constraints.txt)"
if [ "$(cat "$home/built" 2>/dev/null)" = "$wanted" ]; then
  printf '%s\n' "$launcher"
  exit 0
fi

: "${CUDA_HOME:=/usr/local/cuda}"
export CUDA_HOME
[ -x "$CUDA_HOME/bin/nvcc" ] || fail "no CUDA toolkit: no nvcc in $CUDA_HOME/bin (set CUDA_HOME)"
command -v c++ >/dev/null || fail "no C++ compiler"
toolkit=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
ours=$("$main" -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
constraints=constraints.txt
if [ "$ours" = 12 ]; then constraints="constraints-cu12.txt"; fi
[ "$toolkit" = "$ours" ] || fail "the CUDA toolkit is $toolkit.x, torch was built for $ours.x"

mkdir -p "$home"
rm -f "$home/built"
"$main" -m venv --clear "$home/venv"
packages=$("$main" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$packages" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"

# A toolkit can lack cuDNN, NCCL and some of CUDA's own headers; torch's packages bring them all.
for folder in "$packages"/nvidia/*/include; do
  CPATH=${CPATH:+$CPATH:}$folder
done
export CPATH
# Otherwise its set-up first asks the network for a wheel of this very torch.
# Nor may it take this repository's commit for its own.
export NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_NO_LOCAL_VERSION=1 NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-1}
pip=(nice -n 19 "$python" -m pip --disable-pip-version-check --no-input)
log=$home/build.log
failed() {
  tail -n 30 "$log" >&2
  fail "the build of TransformerEngine failed; the end of $log is above"
}
# Unpacked here, so that a build that was cut short goes on from the objects it has.
sources=$home/$(tr -d = <<<"${wanted##* }" | sed 's/-torch/-torch-/')
if [ ! -e "$sources/setup.py" ]; then
  rm -rf "$sources"
  mkdir -p "$sources"
  "${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation --dest "$sources" \
    "${wanted##* }" >"$log" 2>&1 || failed
  tar -xzf "$sources"/*.tar.gz --strip-components 1 -C "$sources"
fi
{
  "${pip[@]}" install --constraint "$constraints" setuptools wheel ninja pybind11 &&
    "${pip[@]}" install --no-build-isolation --constraint "$constraints" \
      "./$sources" "transformer-engine[core_cu$ours]" nvidia-curand
} >"$log" 2>&1 || failed
# torch's own libraries lie in another environment's folder, which the loader does not know.
libraries=$(printf '%s:' "$packages"/nvidia/*/lib)
libraries=${libraries%:}
# It looks for its libraries beside itself, in the system, and where these variables point.
cat >"$launcher" <<END
#!/bin/sh
export LD_LIBRARY_PATH='$libraries'"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CUDNN_HOME='$packages/nvidia' NVRTC_HOME='$packages/nvidia' CURAND_HOME='$PWD/$home/venv'
exec '$python' "\$@"
END
chmod +x "$launcher"
if ! "$launcher" -c 'import transformer_engine.pytorch' >>"$log" 2>&1; then
  tail -n 5 "$log" >&2
  fail "TransformerEngine was built and does not import; the end of $log is above"
fi
printf '%s\n' "$wanted" >"$home/built"
printf '%s\n' "$launcher"

#!/usr/bin/env bash
# Prints the CUDA major version for the pinned packages, 12 or 13, and on stderr why.
# $CUDA decides (12 or 13; a path, as other tools set it, is ignored), else the driver:
# CUDA 13 needs 580 or newer, CUDA 12 runs from 525 on. Without a driver it is 13, which the
# test-suite runs with.
set -euo pipefail

choose() {
  printf '%s\n' "$1"
  printf 'CUDA %s: %s\n' "$1" "$2" >&2
  exit 0
}

case ${CUDA:-} in
  12 | 13) choose "$CUDA" "set by CUDA=$CUDA" ;;
  '' | /*) ;;
  *)
    printf 'CUDA=%s is not supported: set 12 or 13, or unset it to follow the driver\n' "$CUDA" >&2
    exit 2
    ;;
esac

driver=
if command -v nvidia-smi >/dev/null 2>&1; then
  # One line a GPU; a broken driver answers with an error text and a code.
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=
  driver=${driver%%$'\n'*}
fi
major=${driver%%.*}
if ! [[ $major =~ ^[0-9]+$ ]]; then
  choose 13 "no NVIDIA driver found"
elif [ "$major" -ge 580 ]; then
  choose 13 "driver $driver supports it"
elif [ "$major" -ge 525 ]; then
  choose 12 "driver $driver is older than 580, which CUDA 13 needs"
else
  choose 12 "driver $driver is older than 525, which CUDA 12 needs: update it"
fi

#!/usr/bin/env bash
# The ranks of one node of a Slurm job: one task of slurm.sbatch's step, which passes everything.
# It forwards stop signals (USR1, TERM) to the ranks only, not to torchrun's agent: USR1 would kill
# the agent, and after TERM it kills the ranks within 30 seconds, whatever their checkpoint takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
export NODE_RANK=${SLURM_NODEID:?this script is a task of srun}
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}}

agent=
interrupted=
# shellcheck disable=SC2329  # by the trap below
forward() {
  local status rank
  interrupted=yes
  if [ -z "$agent" ]; then return; fi
  # The ranks are the agent's children. Images often lack pgrep, so read /proc.
  for status in $(grep -ls "^PPid:[[:space:]]*$agent\$" /proc/[0-9]*/status || true); do
    rank=${status#/proc/}
    kill -USR1 "${rank%/status}" 2>/dev/null || true
  done
}
trap forward USR1 TERM

# An ignored signal is inherited: by the agent for good, by each rank until it installs a handler.
(
  trap '' USR1
  exec launch/torchrun.sh "$@"
) &
agent=$!
code=127
while :; do
  interrupted=
  wait "$agent" && now=0 || now=$?
  # 127 in a second round: the agent ended, and was waited for, just before the signal.
  [ "$now" -eq 127 ] || code=$now
  # wait was interrupted by a signal to this script, and returned a code of its own.
  [ -n "$interrupted" ] || break
done
exit "$code"

#!/usr/bin/env bash
# The ranks of one node of a Slurm job: one task of slurm.sbatch's step, which passes everything.
# Asked to stop (USR1 or TERM), it tells the ranks alone. torchrun's agent must not hear of it: USR1
# would kill it, and TERM gives the ranks 30 seconds, whatever their save takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
export NODE_RANK=${SLURM_NODEID:?this script is a task of srun}
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}}

agent=
asked=
# shellcheck disable=SC2329  # by the trap below
forward() {
  local status rank
  asked=yes
  if [ -z "$agent" ]; then return; fi
  # The ranks are the agent's children. Images often lack pgrep; /proc is always there.
  for status in $(grep -ls "^PPid:[[:space:]]*$agent\$" /proc/[0-9]*/status || true); do
    rank=${status#/proc/}
    kill -USR1 "${rank%/status}" 2>/dev/null || true
  done
}
trap forward USR1 TERM

# Ignored is inherited: by the agent for good, by each rank until it listens itself.
(
  trap '' USR1
  exec launch/torchrun.sh "$@"
) &
agent=$!
code=127
while :; do
  asked=
  wait "$agent" && now=0 || now=$?
  # 127 on a second round: it ended, and was waited for, just before the signal.
  [ "$now" -eq 127 ] || code=$now
  # Only interrupted by a signal to this script, or ended meanwhile: wait has its own code.
  [ -n "$asked" ] || break
done
exit "$code"

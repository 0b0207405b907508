#!/usr/bin/env bash
# Starts the ranks of one node. Run it once on every node, with the same arguments:
#
#   launch/torchrun.sh                                            # one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh experiment=moe_30b_8x64gb
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh experiment=moe_30b_8x64gb
#
# Environment (all optional on one node):
#   NPROC        ranks on this node               default: its visible GPUs (CUDA_VISIBLE_DEVICES), else 8
#   NNODES       number of nodes                  default: 1
#   NODE_RANK    this node's number from 0        needed when NNODES > 1
#   MASTER_ADDR  host name or address of node 0   needed when NNODES > 1
#   MASTER_PORT  free port on node 0              default: 29500 (several nodes); any (one node)
#   MAX_RESTARTS restarts of all ranks after a failure, in total; a preempted run is not
#                restarted                        default: 0
#   PYTHON       interpreter                      default: .venv/bin/python, else python3
#   OMP_NUM_THREADS  CPU threads a rank           default: 1 (CPU runs are bitwise repeatable)
# Arguments are Hydra overrides and go to train.py unchanged. On several nodes run.dir must be a
# folder that all nodes share. torchrun returns 1 for any failure: read status.json for the reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nnodes=${NNODES:-1}
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=.venv/bin/python
  if [ ! -x "$python" ]; then python=python3; fi
fi

if [ -z "${NPROC:-}" ]; then
  NPROC=$(PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" -m moe_train.backend.cuda.ranks)
fi

if [ "$nnodes" -gt 1 ]; then
  : "${NODE_RANK:?NODE_RANK: number of this node from 0, needed when NNODES > 1}"
  : "${MASTER_ADDR:?MASTER_ADDR: address of node 0, needed when NNODES > 1}"
  rendezvous=(--nnodes "$nnodes" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
elif [ -n "${MASTER_PORT:-}" ]; then
  rendezvous=(--nnodes 1 --master-addr 127.0.0.1 --master-port "$MASTER_PORT")
else
  # A free port, so that two runs on one machine do not share a store.
  rendezvous=(--standalone)
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
restarts=()
if [ -n "${MAX_RESTARTS:-}" ]; then restarts=(--max-restarts "$MAX_RESTARTS"); fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" "${restarts[@]}" \
  --nproc-per-node "$NPROC" train.py "$@"

#!/usr/bin/env bash
# A recipe on all GPUs of this host (without one: on one rank, whose workers use the cores), or of several hosts:
#   bash launch/torchrun.sh recipes/bloodmnist.py ARGS
#   GIDEF_HOSTS=a,b,c bash launch/torchrun.sh recipes/bloodmnist.py ARGS     the same line on each of a, b and c
#   srun bash launch/torchrun.sh recipes/bloodmnist.py ARGS                  one task per host; see slurm/ for jobs
# GIDEF_RANKS, GIDEF_PORT, GIDEF_THREADS: see ranks.sh.  GIDEF_NODES: instead of the number of hosts, e.g. 1:4 for an elastic run.
# GIDEF_RESTARTS: how often ranks that died are started again (default 0; with --out DIR --resume they go on where they were).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/ranks.sh
gidef_activate
gidef_ranks "$@"
mapfile -t hosts < <(gidef_hosts)
options=(--nproc-per-node="$(gidef_ranks_per_host)" --max-restarts="${GIDEF_RESTARTS:-0}")
if [ ${#hosts[@]} -gt 1 ] || [ -n "${GIDEF_NODES:-}" ]; then
    options+=(
        --nnodes="${GIDEF_NODES:-${#hosts[@]}}" --rdzv-backend=c10d --rdzv-endpoint="$(gidef_address "${hosts[0]}"):$(gidef_port)"
        --rdzv-id="gidef-${SLURM_JOB_ID:-0}-${SLURM_STEP_ID:-0}-${SLURM_RESTART_COUNT:-0}"
        --rdzv-conf="join_timeout=$GIDEF_JOIN_S,last_call_timeout=${GIDEF_LAST_CALL_S:-30}"
    )
else
    options+=(--standalone)
fi
exec torchrun "${options[@]}" "$@"

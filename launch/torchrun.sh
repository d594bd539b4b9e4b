#!/usr/bin/env bash
# A recipe on all GPUs of this host (without one: on one rank, whose workers use the cores), or of several hosts:
#   bash launch/torchrun.sh recipes/bloodmnist.py ARGS
#   GIDEF_HOSTS=a,b,c bash launch/torchrun.sh recipes/bloodmnist.py ARGS     the same line on each of a, b and c
#   srun bash launch/torchrun.sh recipes/bloodmnist.py ARGS                  one task per host; see slurm/ for jobs
# GIDEF_RANKS, GIDEF_PORT, GIDEF_THREADS: see ranks.sh.  GIDEF_NODES: instead of the number of hosts, e.g. 1:4 for an elastic run, which meets on the first of GIDEF_HOSTS.
# GIDEF_RESTARTS: how often ranks that died are started again, and go on where they were (default 0; of an elastic run, whose hosts may leave, 10).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/ranks.sh
gidef_wants "$@"
gidef_activate
gidef_ranks "$@"
mapfile -t hosts < <(gidef_hosts)
if [ -n "${GIDEF_NODES:-}" ] && [ ${#hosts[@]} -eq 0 ]; then
    echo "gidef: GIDEF_NODES=$GIDEF_NODES without a host to meet on: set GIDEF_HOSTS, the first of which it is, e.g. GIDEF_HOSTS=$(hostname)." >&2
    exit 2
fi
case "${GIDEF_NODES:-}" in *:*) restarts=10 ;; *) restarts=0 ;; esac
options=(--nproc-per-node="$(gidef_ranks_per_host)" --max-restarts="${GIDEF_RESTARTS:-$restarts}")
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

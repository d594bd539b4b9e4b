#!/usr/bin/env bash
# The same through DeepSpeed's launcher (extra `deepspeed`):
#   bash launch/deepspeed.sh recipes/bloodmnist.py ARGS                                  this host
#   GIDEF_HOSTFILE=hosts bash launch/deepspeed.sh recipes/bloodmnist.py ARGS             "name slots=N" a line; the same line on every host, no ssh
#   GIDEF_HOSTS=a,b / srun bash launch/deepspeed.sh recipes/bloodmnist.py ARGS           as with torchrun.sh
#   GIDEF_HOSTFILE=hosts GIDEF_SSH=1 bash launch/deepspeed.sh recipes/bloodmnist.py ARGS on the first host only; DeepSpeed starts the others by pdsh
# zero1.json to zero3.json beside it are configurations for deepspeed.initialize, with an optimiser that needs no compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/ranks.sh
gidef_wants "$@"
gidef_activate deepspeed
gidef_ranks "$@"
ranks="$(gidef_ranks_per_host)" hostfile="${GIDEF_HOSTFILE:-}"
[ "$(gidef_gpus)" -gt 0 ] || export DS_ACCELERATOR=cpu
if [ -n "$hostfile" ]; then
    mapfile -t hosts < <(awk 'NF && $1 !~ /^#/ {print $1}' "$hostfile")
    GIDEF_HOSTS="${hosts[*]}"
else
    mapfile -t hosts < <(gidef_hosts)
fi
options=()
if [ ${#hosts[@]} -gt 1 ]; then
    if [ -z "$hostfile" ]; then
        hostfile="$(mktemp)"
        printf "%s slots=$ranks\n" "${hosts[@]}" >"$hostfile"
    fi
    options+=(--master_port "$(gidef_port)" --hostfile "$hostfile" --master_addr "$(gidef_address "${hosts[0]}")")
    [ -n "${GIDEF_SSH:-}" ] || options+=(--no_ssh --node_rank "${GIDEF_NODE_RANK:-$(gidef_host_number "${hosts[@]}")}")
else
    free="$(python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')"   # several runs may share a host
    options+=(--master_port "${GIDEF_PORT:-$free}" --hostfile /dev/null --num_gpus "$ranks")
fi
[ "$1" != -m ] || { options+=(--module); shift; }
deepspeed "${options[@]}" "$@" &
pid=$!
trap 'kill -TERM $(pgrep -P "$pid") "$pid" 2>/dev/null || true' TERM INT   # deepspeed itself passes no signal on without ssh
while :; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || exit "$code"
done

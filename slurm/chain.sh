#!/usr/bin/env bash
# Train, attack, report: three jobs, each after the one before has ended well.
#   bash slurm/chain.sh recipes/bloodmnist.py ARGS
# CHAIN_ATTACKS: attacks for `gidef attack`, a task of an array each (default: naive joint).  CHAIN_ATTACK_ARGS: its further options, e.g. "--victims 64".
# CHAIN_SBATCH: options for every job, e.g. "--partition=gpu --gpus-per-node=4".
# Prints the numbers of the jobs; the page is report.html in the run's folder.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash slurm/chain.sh RECIPE ARGS" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/ranks.sh
read -ra options <<<"${CHAIN_SBATCH:-}"
read -ra more <<<"${CHAIN_ATTACK_ARGS:-}"
read -ra attacks <<<"${CHAIN_ATTACKS:-naive joint}"
train="$(sbatch --parsable "${options[@]}" slurm/train.sbatch "$@")"
export PYTHONPATH="$PWD/$(dirname "$1")${PYTHONPATH:+:$PYTHONPATH}"   # the attacks find what the recipe names in its own file, as `python RECIPE` does
run="$(gidef_out "$@")"
run="${run:-runs/slurm-${train%%;*}}"
attack="$(sbatch --parsable "${options[@]}" --dependency="afterok:${train%%;*}" --kill-on-invalid-dep=yes --array="0-$((${#attacks[@]} - 1))" \
    slurm/attack_array.sbatch "$run" --allow-code --attack "${attacks[@]}" "${more[@]}")"
report="$(sbatch --parsable "${options[@]}" --dependency="afterok:${attack%%;*}" --kill-on-invalid-dep=yes slurm/report.sbatch "$run" "${attack%%;*}")"
echo "train ${train%%;*}  attack ${attack%%;*}  report ${report%%;*}  run $run"

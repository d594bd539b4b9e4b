# Sourced by every job in this folder: the one place for what your cluster needs. Sites differ; each line is an example.
#   module purge; module load python/3.12 cuda/12.8
#   export GIDEF_VENV=$HOME/venvs/gidef                                   the virtual environment (default .venv, made if missing)
#   export GIDEF_DATA=/scratch/datasets
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0                  the fabric, where it is not the default; `gidef doctor` checks it
#   GIDEF_CONTAINER=(apptainer exec --nv /images/gidef.sif)               every task is started through it
GIDEF_CONTAINER=()

. launch/environment.sh
. launch/ranks.sh
. slurm/requeue.sh
if [ ${#GIDEF_CONTAINER[@]} -eq 0 ]; then
    exec 9>"${GIDEF_VENV:-.venv}.lock"
    flock 9   # the tasks of an array install once
    gidef_activate
    exec 9>&-
fi

# Sourced by the launchers beside it, after environment.sh: what all ranks of a run share, and which hosts they are on.
# GIDEF_RANKS: ranks per host (default: one per GPU, else one, whose workers use the cores; see --speed.workers).
# GIDEF_HOSTS: "a,b,c", the first is where they meet; without it the scheduler's list (a step of SLURM, PBS, LSF), else this host alone.
# GIDEF_PORT:  where they meet on the first host (default: 29400, under SLURM from the job's number).
# GIDEF_THREADS: threads of numerical libraries per rank (default 1: cores are used by workers; the model's own are --threads).

# gidef_ranks ARGS: the preamble of every launcher. ARGS are the recipe's, for its --out.
gidef_ranks() {
    local out
    out="$(gidef_out "$@")"
    export OMP_NUM_THREADS="${GIDEF_THREADS:-1}" MKL_NUM_THREADS="${GIDEF_THREADS:-1}" OPENBLAS_NUM_THREADS="${GIDEF_THREADS:-1}"
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else restarted ranks dial their dead predecessors (pytorch/pytorch#135712), and a host that comes later is never told where to meet
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}"   # seconds from SIGTERM to SIGKILL of a rank
    export GIDEF_JOIN_S="${GIDEF_JOIN_S:-600}"    # seconds that hosts wait for one another at the start
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${out:-$PWD/runs/$(hostname -s)-$$}/extensions}"   # of this run: a killed compilation locks no other
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1048576}"   # freed weights go back at once: glibc keeps them else
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

# gidef_wants ARGS: ends the script with a line of usage if there are none.
gidef_wants() {
    [ $# -eq 0 ] || return 0
    echo "usage: bash launch/${0##*/} recipes/RECIPE.py ARGS, e.g. bash launch/${0##*/} recipes/paper_table.py --small; or -m gidef COMMAND" >&2
    exit 2
}

# gidef_out ARGS: the value of --out, or nothing.
gidef_out() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --out) echo "${2:-}"; return ;;
            --out=*) echo "${1#--out=}"; return ;;
        esac
        shift
    done
}

gidef_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        [ -z "$CUDA_VISIBLE_DEVICES" ] && echo 0 || tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}

gidef_ranks_per_host() {
    local gpus
    gpus="$(gidef_gpus)"
    echo "${GIDEF_RANKS:-$((gpus > 0 ? gpus : 1))}"
}

# gidef_hosts: the run's hosts, one a line, each once; nothing if it is this host alone.
gidef_hosts() {
    if [ -n "${GIDEF_HOSTS:-}" ]; then
        tr ', ' '\n\n' <<<"$GIDEF_HOSTS" | awk 'NF'
    elif [ -n "${SLURM_STEP_NODELIST:-}" ]; then
        gidef_expand "$SLURM_STEP_NODELIST"
    elif [ -n "${PBS_NODEFILE:-}" ]; then
        awk 'NF && !seen[$1]++ {print $1}' "$PBS_NODEFILE"
    elif [ -n "${LSB_HOSTS:-}" ]; then
        tr ' ' '\n' <<<"$LSB_HOSTS" | awk 'NF && !seen[$1]++'
    fi
}

# gidef_expand LIST: SLURM's a[001-003,7],b one a line; by ourselves in a container, which has no scontrol.
gidef_expand() {
    scontrol show hostnames "$1" 2>/dev/null || python - "$1" <<'PYTHON'
import itertools, re, sys

def numbers(text):
    for first, _, last in (part.partition("-") for part in text.split(",")):
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1))

for host in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", sys.argv[1]):
    parts = re.split(r"\[([^\]]*)\]", host)  # every second one was in brackets
    for chosen in itertools.product(*(list(numbers(part)) if place % 2 else [part] for place, part in enumerate(parts))):
        print("".join(chosen))
PYTHON
}

# gidef_address HOST: what others reach it by; under SLURM the address that SLURM itself uses.
gidef_address() {
    local address=""
    if [ -n "${SLURM_STEP_NODELIST:-}" ] && [ -z "${GIDEF_HOSTS:-}" ]; then
        address="$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    fi
    echo "${address:-$1}"
}

gidef_port() {
    echo "${GIDEF_PORT:-$((${SLURM_JOB_ID:-0} ? 20000 + (SLURM_JOB_ID + 7 * ${SLURM_STEP_ID:-0}) % 20000 : 29400))}"
}

# gidef_host_number HOSTS: this host's place in the list, from 0.
gidef_host_number() {
    local number=0 host
    if [ -n "${SLURM_NODEID:-}" ] && [ -z "${GIDEF_HOSTS:-}" ]; then
        echo "$SLURM_NODEID"
        return
    fi
    for host in "$@"; do
        case "$host" in "$(hostname)" | "$(hostname -s)" | "$(hostname -f 2>/dev/null)") echo "$number"; return ;; esac
        number=$((number + 1))
    done
    echo "gidef: this host, $(hostname), is none of $*: set GIDEF_HOSTS to names that \`hostname\` gives." >&2
    return 1
}

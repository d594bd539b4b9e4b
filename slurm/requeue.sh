# Sourced by the jobs: run a command as the job's step, and put the job back into the queue if it is stopped before its end.
#
# How a job is stopped, and what the batch script sees of it:
#   the time limit is near    --signal=B:USR1@120 sends USR1 to this shell alone, which passes it on as TERM (torchrun dies of USR1)
#   the time limit is over    TERM to the tasks and then to this shell
#   scontrol requeue, scancel the same; SLURM has then decided what becomes of the job, and asking for a requeue would bring a cancelled one back
#   preemption                TERM to the tasks alone: gidef leaves a marker, and SLURM remembers the time of the preemption
# The exit status says nothing: torchrun ends with 1 after any TERM. GIDEF_REQUEUES: lives at most, against a job whose limit is too short to get anywhere.

# gidef_job MARKER COMMAND ARGS: ends the script with the command's status, or requeues the job.
gidef_job() {
    local marker="$1" pid code stopped=""
    shift
    rm -f "$marker"
    export GIDEF_PREEMPTED="$marker"
    gidef_stop() {
        stopped="$1"
        echo "gidef: $1 received, stopping job $SLURM_JOB_ID"
        scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true   # to the tasks, not to this shell
    }
    trap 'gidef_stop USR1' USR1
    trap 'gidef_stop TERM' TERM
    "$@" &   # in the background: bash runs a trap only between commands
    pid=$!
    while :; do
        code=0
        wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break   # else only a trap ended the wait
    done
    if [ "$code" -ne 0 ] && { [ -n "$stopped" ] || [ -e "$marker" ] || gidef_was_preempted; } && gidef_is_undecided \
        && [ "${SLURM_RESTART_COUNT:-0}" -lt "${GIDEF_REQUEUES:-100}" ]; then
        echo "gidef: job $SLURM_JOB_ID was stopped before its end and goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60   # SLURM ends this shell
    fi
    exit "$code"
}

gidef_was_preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

# Whether the job runs on, or would end by its time limit: neither cancelled nor in the queue again.
gidef_is_undecided() {
    scontrol show job "$SLURM_JOB_ID" | grep -qE 'JobState=RUNNING|Reason=TimeLimit'
}

# gidef_again DEFAULT_OUT ARGS: prints what ARGS lack of --out and --resume, one word a line. A folder of the job's own is resumed always, so that
# ranks that torchrun starts again go on; a folder that you named only by a job that was requeued.
gidef_again() {
    local out="$1"
    shift
    if [ -z "$(gidef_out "$@")" ]; then
        printf '%s\n' --out "$out" --resume
    elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        echo --resume
    fi
}

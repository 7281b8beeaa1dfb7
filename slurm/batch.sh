#!/bin/bash
# A run of dtrain. One task runs on each node: dtrain's agent, which starts that node's ranks and watches them.
# The agents' exit code: 0 done, 1 failed, 75 stopped with a checkpoint on SIGTERM or SIGUSR2, 130 on SIGINT.
@setup@
@env@
run=@run@

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# USR2 comes to this shell alone, ahead of the time limit (--signal). Passed on, it has the ranks save a checkpoint.
near_limit= ended= agents=
trap 'near_limit=yes; [[ $agents ]] && kill -USR2 "$agents"' USR2
# TERM comes with scancel, and at the time limit, to this shell and to the agents.
trap 'ended=yes' TERM

property() { # NAME: what Slurm says of this job
    scontrol --oneliner show job "$job" | grep -o " $1=[^ ]*" | cut -d= -f2
}
saved() { # what the run would continue from: the newest checkpoint of each of its fits
    local fit
    { echo .; sed -n 's/^ *"\(.*\)",\{0,1\}$/\1/p' "$run/fits.json"; } 2> /dev/null |
        while read -r fit; do cat "$run/$fit/checkpoints/latest"; done 2> /dev/null || true
}

saved_before=$(saved)
# --wait: of a node that died, srun hears nothing. The other agents do, and end.
srun --nodes=@nodes@ --ntasks=@nodes@ --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    --kill-on-bad-exit=0 --wait=120 --unbuffered --export=ALL@step@ \
    @dtrain@ launch --slurm-node --gpus @gpus@ --resume --run-dir "$run"@options@ \
    @target@ &
agents=$!
[[ $near_limit ]] && kill -USR2 "$agents"
while kill -0 "$agents" 2> /dev/null; do # a signal ends `wait` early
    wait "$agents"
    code=$?
done

again=
if (( code == 75 || code == 128 + 12 || code == 128 + 15 )); then # the latter if they had not begun to listen
    if [[ $near_limit || $(property Reason) == TimeLimit ]]; then
        again="the time limit was near"
    elif [[ ! $ended && $(property PreemptTime) != None ]]; then # else Slurm would take a job that ends for done
        again="the job was preempted"
    fi
elif (( code == 1 )) && grep -q '"type": "NodeLost"' "$run/status.json"; then
    again="a node was lost"
elif (( code == 1 )) && [[ @requeue_on_failure@ == yes ]]; then
    again="the run failed"
fi
if [[ $again ]]; then
    # A run that gets no further must not go on for ever.
    stalls=$run/slurm-stalls
    [[ $(saved) != "$saved_before" ]] && rm -f "$stalls" || echo . >> "$stalls"
    if [[ -e $stalls ]] && (( $(wc -l < "$stalls") >= @most_stalls@ )); then
        echo "dtrain: $again, but @most_stalls@ starts in a row saved no new checkpoint: not requeued; save more often, or ask for more time" >&2
    elif (( $(property Restarts) > ${SLURM_RESTART_COUNT:-0} )); then
        sleep infinity # Slurm is about to requeue it
    else
        echo "dtrain: $again: requeued, to continue from the last checkpoint" >&2
        scontrol requeue "$job"
    fi
fi
exit "$code"

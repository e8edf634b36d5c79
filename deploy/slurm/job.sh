#!/bin/bash
# One GPU of a Slurm cluster, for the search or for a worker. Run this in the folder for the outputs (studies/) and the
# logs, on a file system that all nodes share, in the Python environment that block-search is installed in:
#
#   export SEARCH_STORAGE=postgresql://USER@HOST/DATABASE      # that every node reaches
#   export SEARCH_STORAGE_PASSWORD_FILE=$HOME/.search-password # that every node can read
#   export SEARCH_DATA_DIR=/shared/images                      # default: ~/.cache/block-search/data
#   python -m search data                                      # here, if nodes have no network
#   sbatch deploy/slurm/job.sh run --trials=200
#   sbatch --array=1-8 deploy/slurm/job.sh worker
#
# What else a site needs goes before the script: --partition, --account, --time, --gres=gpu:a100:1; `--gres=none`
# for a CPU. What follows `run` or `worker` is the program's: --study=cpu, --max-trials=3. STUDY_NAME and DATASET are
# variables (default: cifar10 both), because the search and its workers must agree on them.
#
# The search works as well: it watches, trains on its GPU meanwhile, and needs that GPU for the retrain. It is complete
# without an array, and an array can come and go: `sbatch --array` adds workers, `scancel` takes them away.
#
#SBATCH --job-name=block-search
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -u

wrong() {
  echo "job.sh: $*" >&2
  exit 2
}

[[ ${1:-} == run || ${1:-} == worker ]] || wrong "say what to do: sbatch deploy/slurm/job.sh run, or worker"
[[ -n ${SLURM_JOB_ID:-} ]] || wrong "Slurm runs this: sbatch deploy/slurm/job.sh $1"
[[ -n ${SEARCH_STORAGE:-} ]] || wrong "set SEARCH_STORAGE=postgresql://USER@HOST/DATABASE, which every node reaches"
[[ $1 == run || $SEARCH_STORAGE == postgres*://* ]] || wrong "SEARCH_STORAGE must be postgresql://, for nodes to share"
command -v python >/dev/null || wrong "no python: activate the environment of block-search before sbatch"

command=$1 name=${STUDY_NAME:-cifar10} dataset=${DATASET:-cifar10}
# Not SLURM_JOB_ID alone: of one task of an array it is the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
shift
[[ $command == worker ]] || set -- --dataset="$dataset" "$@"
export SEARCH_WORKER_LOG="Slurm job $job on $HOSTNAME: ${SLURM_SUBMIT_DIR:-.}/block-search-$SLURM_JOB_ID.log"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# SIGTERM comes from scancel, from a preemption and from `scontrol requeue`: Slurm knows what to do with this job.
# SIGUSR1 comes two to three minutes before the time limit (at some sites before a preemption, too), and the job would
# end as failed: it goes back into the queue here. Either way the program hands its trial back within 10 s and ends
# with 130.
reason='' child='' signals=0
# shellcheck disable=SC2329 # the traps call it
asked() {
  reason=${reason:-$1} signals=$((signals + 1))
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap 'asked stop' TERM
trap 'asked limit' USR1

# A command's exit status. The command runs in the background so that a signal is handled at once: it ends `wait`, not
# the command. No srun: it adds nothing to one task, and it kills its step instead of passing SIGTERM on.
attend() {
  "$@" &
  child=$!
  [[ -z $reason ]] || kill -TERM "$child"
  local status=127 heard next
  while
    heard=$signals
    wait "$child"
    next=$?
    ((next == 127)) || status=$next # 127: the wait before had the command's own status already
    ((signals > heard))
  do :; done
  child=''
  return "$status"
}

search() {
  attend python -m search "$@"
}

finish() {
  if [[ $reason == limit && $1 != [02] ]]; then
    echo "job.sh: the time limit is near; back into the queue"
    scontrol requeue "$job"
  fi
  exit "$1"
}

echo "job.sh: $command of study $name on $(hostname), job $job, start $((${SLURM_RESTART_COUNT:-0} + 1))"

search data --dataset="$dataset" || finish $?

if [[ $command == worker ]]; then # ten minutes for the search to create the study
  for try in {1..60}; do
    search status --name="$name" >/dev/null && break
    status=$?
    [[ -z $reason ]] || finish 130
    ((try < 60)) || finish "$status"
    attend sleep 10
  done
fi

# 0: done. 2: wrong input, which would be wrong again. 130, 143: asked to stop. Anything else is a crash, such as the
# kernel killing the worker because memory ran out: the study knows of it, and a new process goes on.
for try in 1 2 3; do
  search "$command" --name="$name" "$@"
  status=$?
  case $status in 0 | 2 | 130 | 143) break ;; esac
  ((try < 3)) && [[ -z $reason ]] || break
  echo "job.sh: ended with $status; once more"
  attend sleep 10
done
finish "$status"

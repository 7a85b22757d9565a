#!/usr/bin/env bash
# Trains on a SLURM cluster, with one process for each GPU:
#
#   bash launch/slurm.sh --name NAME --nodes 4 --gpus 8 --config configs/t2v_13b.py:image_256 --workdir DIR --data DIR
#       [--partition P] [--account A] [--time 2-00:00:00] [--dry-run] [-- MORE ...]
#
# DIR are folders that all nodes see; MORE are further arguments of hunyuan_jax.train. Run from a repository that all nodes see, whose
# .venv has jax[cuda13]. The job is queued again when SLURM preempts it and when it fails, but for a mistake in the command.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"

name="" nodes="" gpus="" config="" workdir="" data="" partition="" account="" time=""
read_arguments "name nodes gpus config workdir data" "partition account time" "" "$@"
check name '[A-Za-z0-9][A-Za-z0-9._-]{0,62}' "at most 63 letters, digits, '.', '_' and '-'"
check nodes '[1-9][0-9]{0,4}' "a number of nodes"
check gpus '[1-9][0-9]?' "the number of GPUs of a node"
check workdir '/.*' "an absolute path that all nodes see"
check data '/.*' "an absolute path that all nodes see"

train=("$python" -m hunyuan_jax.train --stopped_code=143 "--config=$config" "--workdir=$workdir" "--config.data.path=$data" ${more[@]+"${more[@]}"})
job="#!/usr/bin/env bash
cd $(quoted "$root") || exit
status=0
srun --kill-on-bad-exit=0 --wait=120 $(quoted "${train[@]}") || status=\$?
# All tasks end when one does. 2 is a mistake in the command, which would fail again; a job that was cancelled does not run any more.
if [ \"\$status\" != 0 ] && [ \"\$status\" != 2 ] && [ \"\${SLURM_RESTART_COUNT:-0}\" -lt 100 ] &&
    [ \"\$(squeue --noheader --job=\"\$SLURM_JOB_ID\" --format=%T)\" = RUNNING ]; then
    scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""

submit=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" --exclusive --requeue)
submit+=(--open-mode=append "--output=${workdir//%/%%}/slurm-%j.log")
[ -z "$partition" ] || submit+=("--partition=$partition")
[ -z "$account" ] || submit+=("--account=$account")
[ -z "$time" ] || submit+=("--time=$time")

run mkdir -p "$workdir" # sbatch does not make the folder of its log
if [ -n "$dry_run" ]; then
    run "${submit[@]}"
    echo "$job"
else
    "${submit[@]}" <<<"$job"
fi

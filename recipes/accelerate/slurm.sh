#!/usr/bin/env bash
# Train on several nodes; a job that is queued again goes on from its last checkpoint.
#   sbatch --nodes 8 recipes/accelerate/slurm.sh runs/my-run --config recipe.yaml --loss target_sft
# The first word is the output folder; the other words are options of `trl-qtarget sft`. The environment variable
# ACCELERATE_CONFIG names another profile than zero3.
# One launcher per node starts a process for each device. Two minutes before its time limit the job queues itself again.
#SBATCH --job-name=trl-qtarget
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

output=${1:?the output folder comes first}
shift
devices=${SLURM_GPUS_ON_NODE:-8}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

words=(
    --accelerate_config "${ACCELERATE_CONFIG:-recipes/accelerate/zero3.yaml}"
    --num_machines "$SLURM_JOB_NUM_NODES"
    --num_processes "$((SLURM_JOB_NUM_NODES * devices))"
    --main_process_ip "${nodes[0]}"
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" # jobs that share a node use different ports
    --output_dir "$output"
    "$@"
)

# trainer_state.json is the last file of a checkpoint: one without it was being written when the job ended
last=$(find "$output" -path '*/checkpoint-*/trainer_state.json' 2> /dev/null | sort -V | tail -n 1 || true)
[[ -z $last ]] || words+=(--resume_from_checkpoint "$(dirname "$last")")

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 bash -c 'exec trl-qtarget sft "$@" --machine_rank "$SLURM_NODEID"' launch "${words[@]}" &
wait $!

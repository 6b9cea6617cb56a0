#!/bin/bash
# A run of any length in pieces of a cluster's time limit: stopped before it, saved, queued again, gone on with.
#   sbatch examples/slurm.sh configs/espo/gsm8k_llada-8b.yaml out/espo
# srun starts one process per GPU, without a launcher between Slurm and the trainer, so that the signal reaches each
# trainer itself. The trainers agree on a step, write a checkpoint and end with status 75.
#SBATCH --job-name=rl4dlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
config=$1
output=$2
trainer=${3:-$(basename "$(dirname "$config")")}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python "trainers/$0.py" --config "$1" --output_dir "$2" --resume_from_checkpoint latest
' "$trainer" "$config" "$output"
status=$?

if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

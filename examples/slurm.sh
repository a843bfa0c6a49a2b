#!/bin/bash
# Train over four hosts with eight GPUs each: sbatch examples/slurm.sh
#
# SLURM asks with SIGTERM two minutes before the time is up: all processes stop after the
# same step, save and end, and the job is queued again to go on from there.
#SBATCH --job-name=llama2-lite
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# Processes that torchrun starts again must not find the addresses of those before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

saved() { ls runs/7b/checkpoints 2>/dev/null; }
before=$(saved)

# The folder of the run has to be on a disk that all hosts share.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=20 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID" \
    --shutdown-timeout=100 \
    -m -- llama2_lite.runtime.cli pretrain --config 7b --data.files 'text/*.parquet' \
    --output runs/7b --stop_within 90

# Not finished, but further than before: once more from the last checkpoint.
if [ ! -f runs/7b/result.json ] && [ "$(saved)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi

#!/bin/bash
# DiT-XL/2 on two nodes of eight GPUs that share this directory: sbatch configs/slurm.sh [more options of train.py]
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300  # seconds to save in after that signal; torchrun's own 30 may be too few
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$first:29500" train.py --config=configs/imagenet-xl.toml "$@"

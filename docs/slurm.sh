#!/usr/bin/env bash
#SBATCH --job-name=nerf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
# One torchrun per node; they meet at the first node. The same job goes on from its checkpoint.
# From the repository's root:  sbatch docs/slurm.sh --config configs/lego.txt
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarts meet at new ports
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:29500" \
    run_nerf.py "$@"

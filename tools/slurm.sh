#!/usr/bin/env bash
#SBATCH --job-name=train_3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # a torchrun, which starts a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0                 # all of a node's, which --exclusive alone does not give
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # the ranks save and leave before the time is over
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append      # Slurm may start the job again, under its number
#
#   sbatch --nodes 4 tools/slurm.sh --model gpt2-medium --dtype bf16 --device cuda --tp 8 --pp 2 \
#       --zero 1 --checkpoint-dir saves --resume
#
# from the repository's folder, which all nodes see under one path. The same line once more goes on
# from the newest checkpoint; queued at once it needs --dependency=afterany:JOB, since torchrun
# returns 1 after a signal. An interface to choose (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) is
# exported before sbatch, which passes the environment on.
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))      # of two jobs on one node each has its own
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # after a restart ranks meet anew (pytorch#135712)
# Seconds from SIGTERM to SIGKILL. torch 2.11 ignores it and kills after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# max-restarts: a rank that dies is started again with all others, and --resume goes on; a node that
# dies ends the job. read_timeout: the first node may take long to import torch. cpu-bind: a task is
# all ranks of a node. The lone -- keeps torchrun from reading our --log as its --log-dir.
exec srun --kill-on-bad-exit=1 --cpu-bind=none \
  "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${NPROC:-${SLURM_GPUS_ON_NODE:-8}}" \
  --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
  --rdzv-conf read_timeout=600 \
  -- "${SCRIPT:-train_3d.py}" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=train_3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun per node; it starts one rank per GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0                 # all memory of a node; --exclusive alone does not grant it
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # 300 s before the time limit the ranks save and exit
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append      # Slurm may restart the job under the same number
#
# Runs train_3d.py on several nodes with Slurm:
#
#   sbatch --nodes 4 tools/slurm.sh --model gpt2-medium --dtype bf16 --device cuda --tp 8 --pp 2 \
#       --zero 1 --checkpoint-dir saves --resume
#
# Run it in the repository's folder, which must have the same path on all nodes. To continue from the
# newest checkpoint, submit the same line again. If that is done while the first job is queued or
# running, add --dependency=afterany:JOB (not afterok: torchrun returns 1 after a signal). To choose a
# network interface, export GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME before sbatch, which passes the
# environment on.
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))      # two jobs on one node need different ports
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # needed for a rendezvous after a restart (pytorch#135712)
# Seconds from SIGTERM to SIGKILL. torch 2.11 ignores this variable and kills after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# max-restarts: if a rank dies, torchrun restarts all ranks and --resume continues; if a node dies,
# the job ends. read_timeout: importing torch may take long on the first node. cpu-bind=none: a Slurm
# task runs all ranks of a node.
exec srun --kill-on-bad-exit=1 --cpu-bind=none \
  "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${NPROC:-${SLURM_GPUS_ON_NODE:-8}}" \
  --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
  --rdzv-conf read_timeout=600 \
  "${SCRIPT:-train_3d.py}" "$@"

#!/bin/bash
# Train one run on several nodes of SLURM: one torchrun a node, one process a GPU.
#
#   sbatch configs/cluster/slurm-train.sh configs/train/demo.yaml name=large
#   sbatch --nodes=4 configs/cluster/slurm-train.sh configs/train/demo.yaml name=large
#
# The loss curve is that of one process. A job that was requeued or cancelled goes on from its last checkpoint: the
# same line, with `name` set, resumes the run when its folder stands.
#
#SBATCH --job-name=earshard-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=train-%j.log

set -euo pipefail
config=${1:?"name a training configuration, such as configs/train/demo.yaml"}
shift
python=${PYTHON:-.venv/bin/python}

# a run of this name that stands is gone on with
resume=()
for word in "$@"; do
    case $word in
    name=*) if [ -e "${RUNS:-runs}/${word#name=}/config.yaml" ]; then resume=(--resume "${RUNS:-runs}/${word#name=}"); fi ;;
    esac
done

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end scontrol by SIGPIPE
port=$((20000 + SLURM_JOB_ID % 20000))
srun "$python" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m train fit "${resume[@]}" --config "$config" "$@"

#!/bin/bash
# Train one run on several SLURM nodes: one torchrun per node, one process per GPU.
#
#   sbatch configs/cluster/slurm-train.sh configs/train/demo.yaml name=large
#   sbatch --nodes=4 configs/cluster/slurm-train.sh configs/train/demo.yaml name=large
#
# The loss curve is the same as with one process. A requeued or canceled job continues from its last checkpoint: the
# same command, with `name` set, resumes the run if its folder exists.
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

# resume an existing run of this name
resume=()
for word in "$@"; do
    case $word in
    name=*) if [ -e "${RUNS:-runs}/${word#name=}/config.yaml" ]; then resume=(--resume "${RUNS:-runs}/${word#name=}"); fi ;;
    esac
done

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would kill scontrol with SIGPIPE
port=$((20000 + SLURM_JOB_ID % 20000))
srun "$python" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m train fit "${resume[@]}" --config "$config" "$@"

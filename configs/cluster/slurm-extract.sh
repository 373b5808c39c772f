#!/bin/bash
# Extract on SLURM: an array whose tasks share one cache.
#
#   sbatch configs/cluster/slurm-extract.sh configs/extract/librispeech.yaml source.path=/data/LibriSpeech root=/shared/caches
#   sbatch --array=0-63%16 configs/cluster/slurm-extract.sh …        # 64 tasks, 16 of them at a time
#
# Task i of n extracts shards i, i + n, … and then helps the others; a task that finds all shards committed merges the
# cache. Tasks may be requeued, canceled, or never start: submit the same command again, and only missing shards are
# extracted and the cache is merged. `root` and the audio must be on storage that all nodes can access.
#
#SBATCH --job-name=earshard-extract
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --output=extract-%A_%a.log

set -euo pipefail
config=${1:?"name an extraction configuration, such as configs/extract/librispeech.yaml"}
shift
# the index and the count come from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT
srun "${PYTHON:-.venv/bin/python}" -m pipeline extract --config "$config" "$@"

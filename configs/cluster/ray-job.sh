#!/bin/bash
# Extract on a Ray cluster that runs: the driver as a job of the cluster, so that it outlives this shell.
#
#   RAY_API_SERVER_ADDRESS=http://head:8265 configs/cluster/ray-job.sh configs/extract/librispeech.yaml root=/shared/caches
#
# A cluster of your own: `ray start --head` on one machine, `ray start --address=HEAD:6379` on the others, in an
# environment with `pip install 'earshard[ray]'`. Every node takes one encoder a GPU; nodes may come and go. The command is
# sent again after any end: only what is absent is made. Without this script, from a node of the cluster:
#   python -m pipeline extract --engine ray --ray-address auto --config …

set -euo pipefail
config=${1:?"name an extraction configuration, such as configs/extract/librispeech.yaml"}
shift
ray job submit --working-dir . --no-wait -- \
    "${PYTHON:-python}" -m pipeline extract --engine ray --ray-address auto --config "$config" "$@"

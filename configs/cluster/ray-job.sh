#!/bin/bash
# Extract on a running Ray cluster. The driver runs as a job of the cluster, so it outlives this shell.
#
#   RAY_API_SERVER_ADDRESS=http://head:8265 configs/cluster/ray-job.sh configs/extract/librispeech.yaml root=/shared/caches
#
# To start a cluster, run `ray start --head` on one machine and `ray start --address=HEAD:6379` on the others, in an
# environment with `pip install 'earshard[ray]'`. Each node runs one encoder per GPU; nodes may join and leave. After an
# interruption, submit the same command again; it extracts only missing shards. Without this script, from a node of the
# cluster:
#   python -m pipeline extract --engine ray --ray-address auto --config …

set -euo pipefail
config=${1:?"name an extraction configuration, such as configs/extract/librispeech.yaml"}
shift
ray job submit --working-dir . --no-wait -- \
    "${PYTHON:-python}" -m pipeline extract --engine ray --ray-address auto --config "$config" "$@"

#!/usr/bin/env bash
# Train from nothing: make .venv, install, train the demo.
#   ./run_train.sh [--section.key value ...]     NPROC: processes on this node (1)     CONFIG_FILE: what to train
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup_venv.sh
nproc=${NPROC:-1}
config=${CONFIG_FILE:-train_configs/debug_moe.toml}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
# threads that wait by spinning lose most of their speed as soon as another program wants a core
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart of workers (PET_MAX_RESTARTS) fails or hangs
exec .venv/bin/torchrun --standalone --nproc_per_node="$nproc" -m titan_moe.train --job.config_file "$config" "$@"

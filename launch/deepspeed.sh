#!/usr/bin/env bash
# DeepSpeed's launcher: over the nodes of HOSTFILE ("host slots=8" a line) by ssh, or RANKS ranks of this machine.
#     HOSTFILE=hostfile launch/deepspeed.sh CONFIG.toml [--section.key value ...]
#     RANKS=2 launch/deepspeed.sh CONFIG.toml [--section.key value ...]
set -euo pipefail
where=(--num_gpus "${RANKS:-1}")
if [[ -n "${HOSTFILE:-}" ]]; then
    where=(--hostfile "$HOSTFILE")
fi
exec "${PYTHON:-python3}" -m deepspeed.launcher.runner "${where[@]}" --master_port "${PORT:-29500}" \
    --module distmerge train "$@"

#!/usr/bin/env bash
# One node of several: run it on each, with NODE_RANK from 0 and HEAD the first node's name.
#     NODES=2 NODE_RANK=0 HEAD=node0 [RANKS=8] launch/torchrun.sh CONFIG.toml [--section.key value ...]
# A job that loses a rank is started again RESTARTS times, and goes on from its newest checkpoint. GRACE: seconds that ranks
# have to commit a checkpoint when the scheduler asks them to stop. distmerge.launch is torchrun, ended by one line and the job's status.
set -euo pipefail
# A restarted job must not meet the addresses of the ranks that died: a rendezvous store for each attempt.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" -m distmerge.launch \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${RANKS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id "${JOB:-distmerge}" \
    --max-restarts "${RESTARTS:-3}" \
    --shutdown-timeout "${GRACE:-280}" \
    -m distmerge train "$@"

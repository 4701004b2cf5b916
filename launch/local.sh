#!/usr/bin/env bash
# This machine alone: RANKS ranks (by default one per worker), started by distmerge itself.
#     [RANKS=4] launch/local.sh CONFIG.toml [--section.key value ...]
set -euo pipefail
exec "${PYTHON:-python3}" -m distmerge train "$@" ${RANKS:+--ranks "$RANKS"}

#!/usr/bin/env bash
# `sagemaker_torchrun.sh` as in older notes: torchrun on every machine of a SageMaker job, which runs the entry.py beside it.
set -euo pipefail
RESONANCE_ENTRY="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/entry.py"
export RESONANCE_ENTRY
exec bash "$(python3 -c 'import resonance.launch as launch; print(launch.__path__[0])')/sagemaker_torchrun.sh" "$@"

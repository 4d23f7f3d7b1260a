#!/usr/bin/env bash
# Starts the training on one machine of a SageMaker job: installs what is missing, then torchrun with one process for
# every GPU and all machines of the job. Flags are passed on and win over the job's hyper-parameters.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
output="${SM_OUTPUT_DIR:-/opt/ml/output}"

stop() {
    mkdir -p "$output"
    echo "$1" | tee "$output/failure" >&2
    exit 1
}

if [ -f "$here/requirements.txt" ]; then
    # The image's own torch stays: another one may not fit its CUDA and drivers.
    kept="$(mktemp)"
    python3 -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$kept" ||
        stop "The container has no PyTorch. Give an image that has it."
    python3 -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" -c "$kept" ||
        stop "Packages could not be installed in the container; what pip says is in the log. Without a connection to a package index, give an image that holds them."
fi
[ ! -d "$here/resonance" ] || export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# exec, so that SageMaker's SIGTERM reaches the training.
exec python3 -m resonance.launch.torchrun "$@"

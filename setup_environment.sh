#!/usr/bin/env bash
# Makes .venv beside this file and installs Resonance into it. Safe to run again: what is there is kept.
# Another Python: PYTHON=/usr/bin/python3.12 ./setup_environment.sh
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here"

stop() {
    printf '\nError: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

# 3.11 or newer, the first that is found.
python=""
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python="$candidate"
        break
    fi
    [ -z "${PYTHON:-}" ] || stop "PYTHON=$PYTHON is not Python 3.11 or newer." "Give another one, or none to let this script look."
done
if [ -z "$python" ]; then
    found="$(python3 --version 2>&1 || true)"
    stop "Python 3.11 or newer is needed, and none was found (python3: ${found:-not installed})." \
        "Ubuntu and Debian: sudo apt-get install python3 python3-venv" \
        "macOS:             brew install python@3.12" \
        "Others:            https://www.python.org/downloads/"
fi
echo "Python: $("$python" --version 2>&1 | cut -d' ' -f2)"

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    # Absent, half-made, or of an older Python.
    if [ -e .venv ]; then
        kept=".venv.old.$(date +%Y%m%d%H%M%S)"
        mv .venv "$kept"
        echo "The .venv that was here does not work and is now called $kept. Delete it when you like."
    fi
    echo "Making the virtual environment .venv"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        stop "The virtual environment could not be made." \
            "Ubuntu and Debian keep it in a package of its own: sudo apt-get install python3-venv" \
            "Then run this script again."
    fi
fi

install() {
    .venv/bin/python -m pip install --disable-pip-version-check "$@" || stop \
        "Packages could not be installed; what pip says is above." \
        "No connection to the package index? Check the network and the proxy (HTTPS_PROXY), or use a mirror:" \
        "  PIP_INDEX_URL=https://mirrors.aliyun.com/pypi/simple/ ./setup_environment.sh" \
        "What is installed already is kept: run this script again."
}

echo "Installing packages. This takes some minutes."
torch="$(grep '^torch==' requirements.txt)"
# On Linux the ordinary torch brings 3 GB of CUDA. Without an NVIDIA card, PyTorch's own index has one without.
slim="--no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu"
if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1 || [ -n "${PIP_INDEX_URL:-}" ] ||
    ! .venv/bin/python -m pip install --quiet --disable-pip-version-check $slim "$torch" 2>/dev/null; then
    install --quiet "$torch"
fi
install --quiet -r requirements.txt
install --quiet --no-deps -e .

echo
.venv/bin/resonance doctor

cat <<'NEXT'

Ready. Next, in this folder:
  source .venv/bin/activate
  resonance data check YOUR_RECORDINGS
README.md has the whole way.
NEXT

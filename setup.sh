#!/usr/bin/env bash
# Set up ldm in .venv:  ./setup.sh  to use it,  ./setup.sh test  to run its tests as well.
# PYTHON names another interpreter than python3 (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")"

"${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# Without an NVIDIA GPU, torch's CPU build saves gigabytes. Where pip is told to look at places of your own, they decide.
torch_from=()
own_places=$(pip config list | grep -E 'index-url|find-links' || true)
if [ "$(uname -s)" = Linux ] && [ -z "$own_places" ] && ! command -v nvidia-smi >/dev/null; then
    torch_from=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
pip install -q -c constraints.txt ${torch_from[@]+"${torch_from[@]}"} torch
# "compat" puts the checkout on Python's path. Without it `import ldm` would, beside a checkout that is called ldm, find
# that folder instead of the package in it.
editable=(--config-settings editable_mode=compat)
if [ "${1:-}" = test ]; then
    pip install -q -c constraints.txt "${editable[@]}" -e ".[test]"
    # Reference implementations of which only single modules are used: their own dependencies are many and stay away.
    pip install -q -c constraints.txt --no-deps k-diffusion open_clip_torch
else
    pip install -q -c constraints.txt "${editable[@]}" -e .
fi

#!/usr/bin/env bash
# Makes or reuses .venv with vwt-hf and the extras named, and respects a torch that is already there.
#   scripts/env.sh test            what the tests need
#   PYTHON=python3.12 scripts/env.sh demo
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    # With --system-site-packages a torch that the machine carries is used, never downloaded again.
    "${PYTHON:-python3}" -m venv --system-site-packages "$venv"
fi
if ! "$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        "$venv/bin/python" -m pip install -q torch
    else
        # PyPI's Linux wheels carry gigabytes of CUDA. 2.13.0 is the version with a CPU build on every index that the
        # project is tested on; elsewhere the CPU index of pytorch.org has it.
        "$venv/bin/python" -m pip install -q "torch==2.13.0" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
fi
"$venv/bin/python" -m pip install -q -e ".[${1:-test}]" "transformers${TRANSFORMERS:->=5.17,<5.25}"

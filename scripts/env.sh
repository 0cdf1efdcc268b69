#!/usr/bin/env bash
# Makes or reuses .venv with vwt-hf and the extras named, and respects a torch that is already there.
#   scripts/env.sh test                     what the tests need
#   PYTHON=python3.12 scripts/env.sh demo   with another interpreter
#   VENV=/tmp/venv scripts/env.sh           in another place
#   PIP_OPTIONS=--no-compile scripts/env.sh   with options for pip install
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
install=("$venv/bin/python" -m pip install -q ${PIP_OPTIONS:-})
has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'

if [ ! -x "$venv/bin/python" ]; then
    # With --system-site-packages a torch that the machine carries is used, never downloaded again.
    "$python" -m venv --system-site-packages "$venv"
    if "$python" -c "$has_torch" && ! "$venv/bin/python" -c "$has_torch"; then
        # That torch belongs to an active virtual environment, and a venv sees only packages of its base.
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active-environment.pth"
    fi
fi
if ! "$venv/bin/python" -c "$has_torch"; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        "${install[@]}" torch
    elif [ "$(uname -s)" = Linux ]; then
        # PyPI's Linux wheels carry gigabytes of CUDA. The suffix +cpu rules them out. The packages that torch needs are
        # installed below, with all others: to ask this index for each would take long if there is no network.
        "${install[@]}" --no-deps "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    else
        "${install[@]}" torch
    fi
fi
"${install[@]}" -e ".${1:+[$1]}"

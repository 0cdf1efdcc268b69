#!/usr/bin/env bash
# Lint, types and tests, at both ends of the transformers range that pyproject.toml declares. Makes its own environment.
#   scripts/test.sh                  everything
#   scripts/test.sh tests/test_auto.py -k clip   these tests alone, at both ends
#   VWT_TEST_PROCESSES=8 scripts/test.sh         in 8 processes instead of 3
set -euo pipefail
cd "$(dirname "$0")/.."
# Packages are compiled when they are first imported, not when they are installed: that takes half as long.
unset PYTHONDONTWRITEBYTECODE
export PIP_OPTIONS=--no-compile
scripts/env.sh test
python=${VENV:-.venv}/bin/python
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy &  # while pip is at work below, and the first processes begin
types=$!
trap 'kill "$types" 2>/dev/null || :' EXIT

# The oldest transformers, with all that it needs but torch, lies beside the newest and comes before it on the path.
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
folder=$("$python" -c "import sys; print(sys.prefix)")/transformers-$oldest
if [ ! -d "$folder/transformers" ]; then
    rm -rf "$folder" "$folder.part"
    "$python" -m pip install -q "$PIP_OPTIONS" --target "$folder.part" "transformers==$oldest.0"
    mv "$folder.part" "$folder"
fi
# Triton, which torch for CPUs lacks, interprets kernels for GPUs. It lies apart, so that nothing else finds it.
triton=$("$python" -c "import sys; print(sys.prefix)")/triton
if [ ! -d "$triton/triton" ] && [ "$(uname -s)" = Linux ]; then
    rm -rf "$triton" "$triton.part"
    "$python" -m pip install -q "$PIP_OPTIONS" --no-deps --target "$triton.part" "triton>=3.9"
    mv "$triton.part" "$triton"
fi
# Tiny models gain nothing from threads: three processes of one thread for two cores, as some tests wait.
export OMP_NUM_THREADS=1
how=(-q -n "${VWT_TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder)
echo "newest transformers:"
VWT_OTHER_END=$folder "$python" -m pytest "${how[@]}" "$@"
wait "$types"
echo "oldest transformers:"
VWT_OTHER_END='' PYTHONPATH=$folder "$python" -m pytest "${how[@]}" "$@"
if [ $# = 0 ] && [ "$(uname -s)" = Linux ]; then
    echo "kernels for GPUs, interpreted:"
    TRITON_INTERPRET=1 PYTHONPATH=$triton "$python" -m pytest -q -n "${VWT_TEST_PROCESSES:-3}" tests/test_kernels.py
fi

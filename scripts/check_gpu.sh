#!/usr/bin/env bash
# Proves or refutes on this machine that the project is right and fast on its GPU: writes gpu_report.md and .json.
#
#     bash scripts/check_gpu.sh [--minutes 8] [--output FOLDER]
#
# Needs PyTorch, and neither network nor checkpoints. The Python is that of .venv where scripts/setup.sh has made one,
# else python3; PYTHON=... names another. Packages that it lacks are taken from the wheels in the folder WHEELS=...
# which a machine with network fills: python3 -m pip download --no-deps -d FOLDER NAME ...
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$python" scripts/benchmarks/check_gpu.py "$@"

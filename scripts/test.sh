#!/usr/bin/env bash
# Sets up .venv where that is needed, checks the style and runs the tests: bash scripts/test.sh [pytest options]
# The package chatglm/ is tested a second time on the oldest supported transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements.txt tests/requirements.txt
# DeepSpeed compiles a library here; a run that was killed meanwhile left a lock that the next would wait for.
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
export HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .

oldest=transformers==5.17.0
if [ ! -d ".venv/$oldest" ]; then
    rm -rf ".venv/$oldest.part"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --target ".venv/$oldest.part" $oldest
    mv ".venv/$oldest.part" ".venv/$oldest"
fi
echo "== $oldest"
PYTHONPATH=".venv/$oldest" .venv/bin/python -m pytest --numprocesses 2 tests/chatglm
echo "== the installed transformers"
exec .venv/bin/python -m pytest --numprocesses 2 "$@"

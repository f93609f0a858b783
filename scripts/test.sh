#!/usr/bin/env bash
# Sets up .venv from the lock files where that is needed, checks the style and runs the tests: the main road (those
# marked `oldest`) on the oldest supported transformers, and everything on the locked libraries.
#     bash scripts/test.sh
# What pytest's options choose, on the locked libraries alone:
#     bash scripts/test.sh OPTION ...
# Everything on the newest libraries, or with --pre on their pre-releases too, in an environment of its own:
#     [TORCH=torch] bash scripts/test.sh --newest [--pre] [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

tests() {  # ENVIRONMENT [pytest options]
    # Each process takes neighbouring tests, which share fixtures, and then some of the other's.
    "$1/bin/python" -m pytest --numprocesses 2 --dist worksteal "${@:2}"
}

if [ "${1:-}" = --newest ]; then
    shift
    pre=()
    if [ "${1:-}" = --pre ]; then pre=(--pre) && shift; fi
    bash scripts/setup.sh --newest "${pre[@]}"
    venv=.venv-newest${pre:+-pre}
    echo "== $($venv/bin/python scripts/newer_than_lock.py)"
    tests $venv "$@"
    exit
fi

bash scripts/setup.sh requirements.lock tests/requirements.lock
.venv/bin/ruff check .
.venv/bin/ruff format --check .

if [ $# = 0 ]; then
    oldest=.venv/oldest  # laid in front of the locked libraries
    if ! cmp -s tests/oldest.lock $oldest/installed; then
        rm -rf $oldest
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $oldest -r tests/oldest.lock
        cp tests/oldest.lock $oldest/installed
    fi
    echo "== the main road on $(cat tests/oldest.txt)"
    PYTHONPATH=$oldest tests .venv -m oldest
fi
echo "== everything on the locked libraries"
tests .venv "$@"

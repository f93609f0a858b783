#!/usr/bin/env bash
# Writes the three lock files anew, from the versions that an environment holds, by default the one that
# `bash scripts/test.sh --newest` made and tested: bash scripts/lock.sh [ENVIRONMENT]
# Needs uv on the PATH. The files serve every system and every Python from 3.10; where a Python older than the
# environment's cannot have a version, uv finds an older one. Left out are torch, which setup.sh installs first, and
# what only its CUDA builds bring: the machine decides between CPU and CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv-newest}/bin/python
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

lock() {  # REQUIREMENTS OUTPUT [-c CONSTRAINTS]...
    uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
        "$1" "${@:3}" -o "$work/resolved"
    echo "# Written by scripts/lock.sh: change $1 and run that." >"$work/lock"
    grep -vE '^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' "$work/resolved" >>"$work/lock"
    mv "$work/lock" "$2"
    rm "$work/resolved"  # uv would keep to it
}

since=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
"$python" -m pip freeze | sed -E "s/(\+.*)?$/ ; python_version >= '$since'/" >"$work/tested"
lock requirements.txt requirements.lock -c "$work/tested"
lock tests/requirements.txt tests/requirements.lock -c requirements.lock -c "$work/tested"
# The oldest transformers lies in front of the locked packages: listed is only what it needs otherwise.
grep -vE '^(transformers|huggingface-hub)==' requirements.lock >"$work/others"
lock tests/oldest.txt tests/oldest.lock -c "$work/others"
grep -vxFf <(grep == requirements.lock) tests/oldest.lock >"$work/lock"
mv "$work/lock" tests/oldest.lock

#!/usr/bin/env bash
# Makes .venv and installs into it the requirements files given as arguments; does nothing when that is done already.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, as python3." >&2; exit 1; }

[ -x .venv/bin/python ] || python3 -m venv .venv
for file in "$@"; do
    installed=".venv/installed-${file//\//-}"
    cmp -s "$file" "$installed" && continue
    echo "Installing $file into .venv (a few minutes the first time) ..."
    # torch by its exact version and before anything else: on Linux that is the CUDA build on a machine
    # with the usual package index, and a CPU build where the machine offers one.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    cp "$file" "$installed"
done

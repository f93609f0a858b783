#!/usr/bin/env bash
# Makes .venv and installs into it the lock files given as arguments; does nothing when that is done already:
#     bash scripts/setup.sh requirements.lock [tests/requirements.lock]
# With --newest instead, or --newest --pre: makes .venv-newest or .venv-newest-pre, with the newest release or
# pre-release of everything but torch that the package index has, whatever upper bound requirements.txt sets.
# There TORCH=torch in the environment takes the newest torch as well, TORCH=torch==2.15.0 that one.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, as python3." >&2; exit 1; }

# torch by its exact version and before anything else: on Linux that is the CUDA build on a machine
# with the usual package index, and a CPU build where the machine offers one.
torch=torch==2.13.0

make_environment() {  # also where an earlier run was stopped in the middle of it
    "$1/bin/python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$1"
}
install() {  # ENVIRONMENT [options of pip]; a second time where the package index failed
    local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}")
    "${pip[@]}" || { echo "Once more in 10 seconds ..." >&2; sleep 10; "${pip[@]}"; }
}
install_newest() {  # [--pre]
    local venv=.venv-newest${1:+-pre} torch=${TORCH:-$torch}
    echo "Installing into $venv the newest ${1:+pre-}release of everything beside $torch ..."
    make_environment $venv
    install $venv $torch
    sed -E 's/,<[0-9.]+//' requirements.txt tests/requirements.txt >$venv/requirements.txt
    echo $torch >$venv/constraints.txt
    install $venv --upgrade --upgrade-strategy eager "$@" -r $venv/requirements.txt -c $venv/constraints.txt
}
install_locked() {  # FILE...
    # What has no wheel (deepspeed, jieba) is built with these. pip up to 26.1 reads the first name, from 25.3 the second.
    export PIP_CONSTRAINT=scripts/build_tools.txt PIP_BUILD_CONSTRAINT=scripts/build_tools.txt
    make_environment .venv
    for file in "$@"; do
        local installed=".venv/installed-${file//\//-}"
        cmp -s "$file" "$installed" && continue
        echo "Installing $file into .venv (a few minutes the first time) ..."
        install .venv $torch
        install .venv -r "$file"
        cp "$file" "$installed"
    done
}

if [ "${1:-}" = --newest ]; then
    install_newest "${@:2}"
else
    install_locked "$@"
fi

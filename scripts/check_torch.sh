#!/usr/bin/env bash
# Try this checkout on a version of torch: tiny trainings of each layout, torch.compile, float8, then the unit tests.
# It makes an environment of that version outside of the checkout, or takes the one that an earlier call made.
# Usage: scripts/check_torch.sh VERSION [ENVIRONMENT]
#     VERSION      2.11.0 to 2.15.0; the builds for CUDA, of 3 to 5 GB, run on a CPU, too
#     ENVIRONMENT  a folder with bin/python that has that torch already
#     PYTHON       the interpreter of a new environment (python3)
#     PARTS        what to run ("trainings tests")
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/check_torch.sh VERSION [ENVIRONMENT]}

make_environment() {
    local python=${PYTHON:-python3} key cache fresh
    key=$("$python" --version | cat - pyproject.toml constraints.txt | sha256sum | cut -c 1-16)
    cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/titan_moe
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || cache=$PWD/.venv  # a user without a home
    venv=$cache/torch-$version-$key
    [ -d "$venv" ] && return
    fresh=$venv.$$
    "$python" -m venv "$fresh"
    echo "installing torch $version into $venv (some minutes the first time)" >&2
    # The dependencies alone: the code is this checkout's. torch and what it brings have versions of their own.
    mkdir "$fresh/package" && cp pyproject.toml README.md LICENSE "$fresh/package"
    sed -E 's/^torch==.*/torch=='"$version"'/' constraints.txt >"$fresh/constraints.txt"
    "$fresh/bin/python" -m pip install --disable-pip-version-check -q -c "$fresh/constraints.txt" torch \
        "$fresh/package[dev,interop]" >"$fresh/install.log" 2>&1 ||
        { tail -n 20 "$fresh/install.log" >&2; rm -rf "$fresh"; echo "error: installation of torch $version failed" >&2; exit 1; }
    mv -T "$fresh" "$venv" 2>/dev/null || rm -rf "$fresh"  # another run was faster
}

if [ $# -gt 1 ]; then venv=$2; else make_environment; fi
python=$venv/bin/python
found=$("$python" -c 'import torch; print(torch.__version__)')
[ "${found%%+*}" = "$version" ] || { echo "error: $venv has torch $found, not $version" >&2; exit 2; }

export PYTHONPATH=$PWD OMP_NUM_THREADS=1
failed=0
for part in ${PARTS:-trainings tests}; do
    case $part in
        trainings) "$python" scripts/check_layouts.py || failed=1 ;;
        tests) "$python" -m pytest tests/unit -q -n "${WORKERS:-2}" --dist worksteal || failed=1 ;;
        *) echo "error: PARTS ($part): trainings and tests are known" >&2; exit 2 ;;
    esac
done
exit $failed

#!/usr/bin/env bash
# Make an environment with torchtitan and the pinned versions of constraints-torchtitan.txt, and print its folder; quick
# when it is there. It is kept outside of the checkout and holds no titan_moe: run its Python in the checkout.
# torchtitan wants an older datasets than constraints.txt has, so it cannot be in .venv.
# Usage: scripts/setup_torchtitan.sh     (PYTHON chooses the interpreter, default python3; 3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    { echo "error: torchtitan needs Python 3.11 or newer: set PYTHON=..." >&2; exit 2; }
key=$("$python" --version | cat - constraints-torchtitan.txt | sha256sum | cut -c 1-16)
cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/titan_moe
mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || cache=$PWD/.venv  # a user without a home
venv=$cache/torchtitan-$key
if [ ! -d "$venv" ]; then
    fresh=$venv.$$
    "$python" -m venv "$fresh"
    log=$fresh/install.log
    echo "installing torchtitan into $venv (some minutes the first time)" >&2
    install() { "$fresh/bin/python" -m pip install --disable-pip-version-check -q "$@" >>"$log" 2>&1; }
    install -c constraints-torchtitan.txt torch && install -r constraints-torchtitan.txt ||
        { tail -n 20 "$log" >&2; rm -rf "$fresh"; echo "error: installation of torchtitan failed" >&2; exit 1; }
    mv -T "$fresh" "$venv" 2>/dev/null || rm -rf "$fresh"  # another run was faster
fi
echo "$venv"

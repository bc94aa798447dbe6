#!/usr/bin/env bash
# Make .venv with the pinned versions of constraints.txt and the package itself; quick when nothing has changed.
# Usage: scripts/setup_venv.sh [EXTRA,...]     (PYTHON chooses the interpreter, default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
want=$(cat pyproject.toml constraints.txt <(echo "$extras") | sha256sum)
stamp=.venv/.installed-${extras//,/-}
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    { echo "error: $python is not Python 3.10 or newer: set PYTHON=..." >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
log=.venv/install.log
echo "installing into .venv (some minutes the first time; log: $log)" >&2
# torch first and pinned: another package asking for it could bring another, larger build
install() { .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt "$@" >>"$log" 2>&1; }
: >"$log"
install torch && install -e ".${extras:+[$extras]}" ||
    { tail -n 20 "$log" >&2; echo "error: installation failed: see $log" >&2; exit 1; }
echo "$want" >"$stamp"

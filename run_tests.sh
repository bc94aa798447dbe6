#!/usr/bin/env bash
# Test from nothing: make .venv, install, lint, check types, run the tests.   ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
# The tests that .venv skips have an environment of their own, made meanwhile; with Python 3.10 there is no torchtitan 0.3.
making=
if [ $# = 0 ] && "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    scripts/setup_torchtitan.sh >/dev/null & making=$!
fi
scripts/setup_venv.sh dev,interop
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
scripts/build_docs.sh
if [ -n "$making" ]; then
    wait "$making"
    torchtitan=$(scripts/setup_torchtitan.sh)
    "$torchtitan/bin/python" -m pytest tests/torchtitan -n 2 --dist loadfile
fi
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"

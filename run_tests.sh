#!/usr/bin/env bash
# Test from nothing: make .venv, install, lint, check types, run the tests.   ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup_venv.sh dev,interop
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
# The tests that .venv skips, in an environment of their own; with Python 3.10 there is no torchtitan 0.3.
if [ $# = 0 ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    torchtitan=$(PYTHON=.venv/bin/python scripts/setup_torchtitan.sh)
    "$torchtitan/bin/python" -m pytest tests/torchtitan -n 2 --dist loadfile
fi
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"

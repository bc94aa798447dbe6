#!/usr/bin/env bash
# Test from nothing: make .venv, install, lint, check types, run the tests.   ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup_venv.sh dev,interop
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"

#!/usr/bin/env bash
# Build the docs as a site, build/site/index.html; a link or an anchor that leads nowhere is an error.
# Needs the extra `docs` (dev has it).     PYTHON: an interpreter that has it (.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=scripts NO_MKDOCS_2_WARNING=1 # of the theme's own future
exec "${PYTHON:-.venv/bin/python}" -m mkdocs build --strict "$@"

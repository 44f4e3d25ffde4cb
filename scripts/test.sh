#!/bin/sh
# sh scripts/test.sh [pytest arguments]: style, then all fast tests.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "ruff"
python -m ruff check .
echo "pytest"
exec python -m pytest -q "$@"

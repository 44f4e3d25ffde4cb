#!/bin/sh
# sh scripts/test.sh [pytest arguments]: style, types, then all fast tests; the ten slowest are listed at the end.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "ruff"
python -m ruff check .
python -m ruff format --check .
echo "pyright"
python -m pyright
echo "pytest"
exec python -m pytest -q --durations=10 "$@"

#!/bin/sh
# sh scripts/test.sh [pytest arguments]: style, types, then all fast tests, in as many processes
# as there are cores (-n 0: in one); a file's tests stay together, as they share what they made.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "ruff"
python -m ruff check .
python -m ruff format --check .
echo "pyright"
python -m pyright
echo "pytest"
exec python -m pytest -q -n auto --dist loadfile --durations=10 "$@"

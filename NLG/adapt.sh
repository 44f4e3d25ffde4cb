#!/bin/sh
# sh NLG/adapt.sh --config configs/nlg/llama2_13b.yaml [--section.field VALUE ...]; --help lists the fields.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python NLG/adapt.py "$@"

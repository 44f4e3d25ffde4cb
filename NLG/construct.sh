#!/bin/sh
# sh NLG/construct.sh --config configs/nlg/llama2_13b.yaml [--section.field VALUE ...]; --help lists the fields.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python NLG/construct_fda.py "$@"

#!/bin/sh
# sh NLU/adapt.sh --config configs/nlu/roberta_base.yaml [--section.field VALUE ...]; --help lists the fields.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python NLU/adapt.py "$@"

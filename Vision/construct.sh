#!/bin/sh
# sh Vision/construct.sh --config configs/vision/vit_b32.yaml [--section.field VALUE ...]; --help lists the fields.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python Vision/construct_fda.py "$@"

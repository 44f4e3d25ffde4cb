#!/bin/sh
# sh scripts/demo.sh [--section.field VALUE ...]
# Merge the experts of a toy model by every method, refine each merge with functional dual anchors, print the scores.
# Needs no GPU and, once installed, no network; a second run reuses what the first made.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "1/2  toy checkpoints and data: toy/vision"
python scripts/make_toy.py vision --out toy/vision
echo "2/2  anchors, merges, adaptation and scores: configs/vision/toy.yaml"
exec python scripts/compare.py --config configs/vision/toy.yaml "$@"

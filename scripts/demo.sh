#!/bin/sh
# sh scripts/demo.sh [vision | nlu | nlg] [--section.field VALUE ...]
# Merge the experts of a toy model, refine the merge with functional dual anchors, print the scores and what they show.
# Needs no GPU and, once installed, no network; a second run reuses what the first made.
set -eu
cd "$(dirname "$0")/.."
toy=vision
case "${1:-}" in
    vision | nlu | nlg) toy=$1; shift ;;
    "" | -*) ;;
    *) echo "demo.sh: no toy is called '$1'; choose from vision, nlu, nlg" >&2; exit 2 ;;
esac
. scripts/environment.sh
echo "1/2  toy checkpoints and data: toy/$toy"
python scripts/make_toy.py "$toy" --out "toy/$toy"
echo "2/2  anchors, merges, adaptation and scores: configs/$toy/toy.yaml"
exec python scripts/compare.py --config "configs/$toy/toy.yaml" "$@"

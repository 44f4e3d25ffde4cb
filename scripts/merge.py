"""Merge by start.method alone (average, ta, tsv, wudi, ...), write a stock checkpoint, score it."""

from common.command import run
from common.pipeline import merge_alone

if __name__ == "__main__":
    run(merge_alone, None, __doc__)

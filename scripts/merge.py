"""Merge by start.method alone (average, ta, tsv, wudi, ...), write a stock checkpoint, score it."""

from functools import partial

from common.command import run
from common.pipeline import merge_alone
from common.planning.dry_run import MERGE, describe

if __name__ == "__main__":
    run(merge_alone, None, __doc__, partial(describe, checks=MERGE))

"""Construct functional dual anchors for text encoders (box 1): one file per task and block."""

from functools import partial

from common.command import run
from common.pipeline import construct
from common.planning.dry_run import CONSTRUCT, describe

if __name__ == "__main__":
    run(construct, "nlu", __doc__, partial(describe, checks=CONSTRUCT))

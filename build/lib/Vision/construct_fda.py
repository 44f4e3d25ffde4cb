"""Construct functional dual anchors for CLIP image towers (box 1): one file per task and block."""

from functools import partial

from common.command import run
from common.pipeline import construct
from common.planning.dry_run import CONSTRUCT, describe

if __name__ == "__main__":
    run(construct, "vision", __doc__, partial(describe, checks=CONSTRUCT))

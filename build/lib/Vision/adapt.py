"""Adapt a merged CLIP image tower on the anchors (box 2), put the checkpoint together, and score it."""

from functools import partial

from common.command import run
from common.pipeline import adapt
from common.planning.dry_run import ADAPT, describe

if __name__ == "__main__":
    run(adapt, "vision", __doc__, partial(describe, checks=ADAPT))

"""Construct functional dual anchors for CLIP image towers (box 1): one file per task and block."""

from common.command import run
from common.pipeline import construct
from Vision import domain

if __name__ == "__main__":
    run(construct, domain, __doc__)

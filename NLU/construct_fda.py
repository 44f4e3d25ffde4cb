"""Construct functional dual anchors for text encoders (box 1): one file per task and block."""

from common.command import run
from common.pipeline import construct
from NLU import domain

if __name__ == "__main__":
    run(construct, domain, __doc__)

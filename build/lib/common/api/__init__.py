"""The method from Python: `merge`, `construct` and `adapt` on models in memory, or wherever a config names one.

    from common.api import Anchors, adapt, construct, merge

    experts = {"math": math, "code": code}                       # modules, or paths, or places on the hub
    merged = merge(base, experts, "wudi")                        # a module like base
    anchors = construct(base, experts, Anchors(steps=200))       # {task: [x_ATD of each block]}
    adapted = adapt(base, experts, anchors, "wudi")              # a module like base

They run what the commands run (common/pipeline.py), with the same defaults, refusals and bytes as result: modules are
written as checkpoints to a temporary folder first, as their library saves them. That takes the disk space of base,
experts and result, in the folder for temporary files (TMPDIR), besides the anchors; in memory is what a command needs
besides the modules, and at the end the merged one. Nothing is scored. As a command does, they set PyTorch to
deterministic kernels and full float32 for the rest of the process.
"""

from common.api.anchor_set import AnchorSet
from common.api.calls import adapt, construct, merge
from common.config import Adapt, Anchors, Eval, Model, Start

__all__ = ["Adapt", "AnchorSet", "Anchors", "Eval", "Model", "Start", "adapt", "construct", "merge"]

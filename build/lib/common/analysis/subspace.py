"""Do anchors come to lie where real features do? (paper section 5)

Real features: what reaches the block in the task's expert, of inputs of its test set. Both are unfolded to rows, and
the subspaces of their top right singular vectors compared, without centring.

The paper says neither whether features are inputs or outputs of the block, nor whether they are centred. Anchors take
the place of inputs, so inputs they are here. Deviation: the sum is divided by the number of vectors, k = round(0.2 D),
not by 0.2 D, so that equal subspaces have a similarity of 1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.core.errors import InputError
from common.evaluation.figures import COLOURS, GREY
from common.evaluation.rows import display

SHARE = 0.2  # of the width: the paper's
INPUTS = 64  # of each task: the paper's


def top_subspace(x_RD: Tensor, share: float = SHARE) -> Tensor:
    """The right singular vectors (D, k) of the k = round(share D) largest singular values of x_RD, in float64.

    Raises: InputError if x has fewer rows than that.
    """
    rows, width = x_RD.shape
    k = max(1, round(share * width))
    if rows < k:
        raise InputError(f"{rows} tokens have no {k} right singular vectors, {share:.0%} of the width {width}")
    wide = x_RD.double()
    return torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, -k:]


def similarity(u_Dk: Tensor, v_Dk: Tensor) -> float:
    """tr(U Uᵀ V Vᵀ) / k of two orthonormal bases: 1 for the same subspace, k / D on average for random ones."""
    return float((u_Dk.mT @ v_Dk).square().sum() / u_Dk.shape[1])


def measure(material: Material) -> Numbers:
    """The similarity at each step that the anchors were kept at, for each initialisation."""
    panels = []
    for task in material.tasks:
        for index, real_RD in material.real_inputs(task, INPUTS):
            real = top_subspace(real_RD)
            curves = {
                init: {
                    step: similarity(top_subspace(x.flatten(0, 1)), real)
                    for step, x in material.path(init, task, index).items()
                }
                for init in material.inits
            }
            panels.append({"title": material.title(task, index), "curves": curves})
    width = material.experiment.shape[2]
    return {"inputs": INPUTS, "random": max(1, round(SHARE * width)) / width, "panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A line for each initialisation, and where random subspaces are."""
    for (init, curve), colour in zip(panel["curves"].items(), COLOURS, strict=False):
        steps = list(map(int, curve))
        axes.plot(steps, curve.values(), color=colour, marker="o", markersize=3, linewidth=1.3, label=display(init))
    axes.axhline(numbers["random"], color=GREY, linestyle="--", linewidth=1, label="random")

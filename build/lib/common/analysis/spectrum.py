"""The spectrum of the anchors (paper section 3.3): s_k / s_1 of their tokens, unfolded to a matrix X (A·T, D).

Gaussian anchors begin nearly flat, s_D / s_1 = (√R − √D) / (√R + √D) of R rows; optimised ones have a long tail.
"""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers

POINTS = 65  # values of k that are kept of a curve


def relative_spectrum(x_RD: Tensor) -> Tensor:
    """s_k / s_1 of the singular values s_1 ≥ … ≥ s_D of x_RD, in float64, down to 1e-8; zeros for a matrix of zeros.

    From the eigenvalues of xᵀx, which take less time and memory than those of x.
    """
    wide = x_RD.double()
    squares = torch.linalg.eigvalsh(wide.mT @ wide).flip(0).clamp_min(0)
    return (squares / squares[0].clamp_min(torch.finfo(squares.dtype).tiny)).sqrt()


def measure(material: Material) -> Numbers:
    """A curve for each step that the anchors were kept at."""
    width = material.experiment.shape[2]
    k = torch.linspace(1, width, min(POINTS, width)).round().long()
    panels = []
    for init in material.inits:
        for index in material.blocks:
            for task in material.tasks:
                spectra = {s: relative_spectrum(x.flatten(0, 1)) for s, x in material.path(init, task, index).items()}
                curves = {step: spectrum.cpu()[k - 1] for step, spectrum in spectra.items()}
                panels.append({"title": material.title(task, index, init), "curves": curves})
    return {"k": k, "panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A line for each step, the later the lighter."""
    curves = panel["curves"]
    for i, (step, ratios) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.92 * i / max(1, len(curves) - 1))
        axes.plot(numbers["k"], ratios, color=colour, linewidth=1.3, label=f"step {step}")
    axes.set_ylim(0, 1.02)

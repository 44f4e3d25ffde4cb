"""How much the anchors of one task move the outputs that another asks for. Ours, the paper has no such analysis.

The anchors of task i ask for a step of the block from θ₀: in every tensor p the descent direction of their distance, as
long as the task vector there,

    δ_{i,p} = ‖τ_{i,p}‖ · (−g_{i,p}) / ‖g_{i,p}‖,    g_i = ∂/∂θ Dist(φ(θ; x_i), φ(θ_i; x_i)) at θ = θ₀,

which is τ_i itself where the matching loss is 0. How far it moves the outputs at the anchors of task j, against how far
j's own expert is from θ₀ there, is

    I_ij = ‖φ(θ₀ + δ_i; x_j) − φ(θ₀; x_j)‖ / ‖φ(θ_j; x_j) − φ(θ₀; x_j)‖.

0: i leaves the outputs of j alone. 1: it moves them as far as j wants, whichever way.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.core.blocks import Block, nonzero_tensors
from common.core.task_vectors import Params
from common.fda.matching import MatchingProblem, summed_gradient


def asked_step(problem: MatchingProblem, x_ATD: Tensor, *, distance: str = "cos", chunk: int | None = None) -> Params:
    """δ: the descent direction that anchors x induce at θ₀, in every tensor of τ as long as τ there."""
    chunks = problem.block_input(x_ATD).split(chunk or len(x_ATD))
    gradients = summed_gradient(problem, chunks, distance)
    tiny = torch.finfo(x_ATD.dtype).tiny
    return {
        name: -g * (tau.norm() / g.norm().clamp_min(tiny))
        for (name, tau), g in zip(problem.tau.items(), gradients, strict=True)
    }


@torch.no_grad()
def interference(block: Block, theta_0: Params, step: Params, theta_j: Params, x_ATD: Tensor) -> float | None:
    """I: how far a step δ moves the block's outputs at x, against θ_j; None where θ_j moves nothing.

    Tensors that δ leaves out stay at θ₀.
    """
    moved = {name: p + step[name] if name in step else p for name, p in theta_0.items()}
    y_0, y, y_j = (block(theta, x_ATD).double() for theta in (theta_0, moved, theta_j))
    wanted = (y_j - y_0).norm()
    return float((y - y_0).norm() / wanted) if wanted > 0 else None


def measure(material: Material) -> Numbers:
    """The matrix I of each block: a row for the task whose anchors ask, a column for the task whose outputs move."""
    experiment, settings, panels = material.experiment, material.config.anchors, []
    for init in material.inits:
        for index in material.blocks:
            problems, anchors = {}, {}
            for task in material.tasks:
                theta_0, theta_t = material.thetas(task, index)
                tau = nonzero_tensors(experiment.matched(experiment.task_vector(task, theta_0, theta_t)))
                block = experiment.matched_function(index, theta_0)
                theta_0, theta_t = experiment.matched(theta_0), experiment.matched(theta_t)
                problems[task] = MatchingProblem(block, theta_0, theta_t, tau)  # stored anchors have their positions
                anchors[task] = material.anchors(init, task, index)
            matrix = []
            for i, asking in problems.items():
                step = asked_step(asking, anchors[i], distance=settings.distance, chunk=settings.chunk)
                moved = [interference(p.block, p.theta_0, step, p.theta_t, anchors[j]) for j, p in problems.items()]
                matrix.append(moved)
            panels.append({"title": material.title("", index, init), "matrix": matrix})
    return {"tasks": material.tasks, "panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """The matrix, a number in each cell."""
    tasks, matrix = numbers["tasks"], [[math.nan if v is None else v for v in row] for row in panel["matrix"]]
    most = max([1.0, *(v for each in numbers["panels"] for row in each["matrix"] for v in row if v is not None)])
    axes.imshow(matrix, cmap="cividis", vmin=0, vmax=most)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "black" if value > 0.55 * most else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.grid(False)

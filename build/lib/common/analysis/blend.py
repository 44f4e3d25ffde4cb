"""Between a start and the model adapted from it: what the anchors say of each blend, and what held-out examples say.

θ(t) = θ_start + t (θ_FDA − θ_start). On the anchors it is measured by the squared distance of its outputs to those of
each task's expert, as a share of the squared length of these: of each block at the anchors of that block, and of all
blocks, one behind the other, at those of the first, which no block was fitted to. The mean over tasks, and over blocks.
Held out: Avg on the validation cut as compare.search.fda found it, if it was searched.

Ours. A rule that stops or weighs the adaptation without data could only go by the first two.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.core.blocks import Block
from common.core.task_vectors import Params
from common.evaluation.figures import COLOURS
from common.evaluation.rows import display
from common.evaluation.tuning import FDA, read_search

BLENDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def apart(y: Tensor, y_t: Tensor) -> float:
    """‖y − y_t‖² / ‖y_t‖²."""
    return float((y - y_t).double().square().sum() / y_t.double().square().sum())


@torch.no_grad()
def by_block(
    blocks: Sequence[Block], thetas: Sequence[Params], experts: Sequence[Params], anchors: Sequence[Tensor]
) -> float:
    """Of each block at its own anchors: the mean over blocks."""
    each = zip(blocks, thetas, experts, anchors, strict=True)
    return fmean(apart(block(theta, x), block(theta_t, x)) for block, theta, theta_t, x in each)


@torch.no_grad()
def through_all(blocks: Sequence[Block], thetas: Sequence[Params], experts: Sequence[Params], x_ATD: Tensor) -> float:
    """Of all blocks, one behind the other, at anchors of the first."""
    y = y_t = x_ATD
    for block, theta, theta_t in zip(blocks, thetas, experts, strict=True):
        y, y_t = block(theta, y), block(theta_t, y_t)
    return apart(y, y_t)


def measure(material: Material) -> Numbers:
    """For each start and initialisation a value at each blend."""
    experiment, tasks, panels = material.experiment, material.tasks, []
    every = range(experiment.depth)

    def read(checkpoint: Any) -> list[Params]:
        return [experiment.read_block(checkpoint, index) for index in every]

    experts = {task: read(experiment.experts[task]) for task in tasks}
    for init in material.inits:
        anchors = {task: [material.anchors(init, task, index) for index in every] for task in tasks}
        for start in material.config.compare.starts:
            before, after = read(material.start(start)), read(material.adapted(start, init))
            found: dict[str, list[float]] = {"by block": [], "through all": []}
            for t in BLENDS:
                thetas = [{n: p + t * (b[n] - p) for n, p in a.items()} for a, b in zip(before, after, strict=True)]
                functions = experiment.functions
                of_blocks = [by_block(functions, thetas, experts[task], anchors[task]) for task in tasks]
                of_all = [through_all(functions, thetas, experts[task], anchors[task][0]) for task in tasks]
                found["by block"].append(fmean(of_blocks))
                found["through all"].append(fmean(of_all))
            scheme = f", {display(init)}" if len(material.inits) > 1 else ""
            panels.append({"title": f"from {display(start)}{scheme}", **found, "cut": held_out(material, start, init)})
    return {"blends": list(BLENDS), "panels": panels}


def held_out(material: Material, start: str, init: str) -> dict[str, float]:
    """{blend: Avg on the validation cut}, of blends that were searched alone."""
    rows = read_search(material.config)["candidates"]
    mine = [row for row in rows if (row["method"], row.get("start"), row.get("init")) == (FDA, start, init)]
    return {str(row["fields"]["blend"]): row["avg"] for row in mine if set(row["fields"]) == {"blend"}}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """Each value as a multiple of that of the start."""
    for key, colour in zip(("by block", "through all"), COLOURS, strict=False):
        values = [value / panel[key][0] for value in panel[key]]
        axes.plot(numbers["blends"], values, color=colour, label=f"distance on anchors, {key}")
    cut = sorted((float(blend), value) for blend, value in panel["cut"].items())
    if cut and cut[0][0] == 0:
        blends, values = zip(*cut, strict=True)
        axes.plot(blends, [v / values[0] for v in values], "o-", color=COLOURS[2], markersize=3, label="Avg, held out")
    axes.axhline(1, color="0.6", linewidth=0.6, zorder=0)

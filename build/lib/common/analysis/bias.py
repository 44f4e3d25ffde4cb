"""The representation bias: how far a merged model's features are from those of a task's own expert, before and after
FDA.

Features: what the task's head is given, of inputs of its test set. Their distance is the mean ℓ1 of Representation
Surgery (Yang et al. 2024, arXiv 2402.02705): the mean over inputs and elements of |z − z_t|.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.core.task_vectors import Params
from common.evaluation.figures import COLOURS, DOT, RING, draw_gains
from common.evaluation.rows import display
from common.merging.calibration import CalibrationTask

INPUTS = 64  # of each task


def representation_bias(features: Sequence[Tensor], individual: Sequence[Tensor]) -> float:
    """The mean over inputs of the mean |z − z_t|, an input's features z and those z_t of the expert; a tensor each."""
    distances = [(z - z_t).double().abs().mean() for z, z_t in zip(features, individual, strict=True)]
    return float(torch.stack(distances).mean())


@torch.no_grad()
def features_of(task: CalibrationTask, theta: Params) -> list[Tensor]:
    """What the task's head is given by a model with these weights, batch by batch."""
    return [task.features(theta, batch) for batch in task.batches]


def measure(material: Material) -> Numbers:
    """For each start the bias of each task, of the start and of the models adapted from it."""
    read = {task: material.calibration(task, INPUTS) for task in material.tasks}
    tasks = {task: replace(inputs, batches=list(inputs.batches)) for task, inputs in read.items()}
    individual = {task: features_of(inputs, material.expert(task)) for task, inputs in tasks.items()}

    def biases(theta: Params) -> list[float]:
        return [representation_bias(features_of(tasks[task], theta), individual[task]) for task in tasks]

    panels = []
    for start in material.config.compare.starts:
        before = biases(material.read(material.start(start)))
        after = {init: biases(material.read(material.adapted(start, init))) for init in material.inits}
        panels.append({"title": f"from {display(start)}", "before": before, "after": after})
    return {"inputs": INPUTS, "tasks": material.tasks, "panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A line for each task, from the start, a ring, to the adapted models, dots."""
    draw_gains(axes, panel["before"], list(panel["after"].values()))
    axes.plot([], [], **RING, label="start")
    for init, colour in zip(panel["after"], COLOURS, strict=False):
        axes.plot([], [], **DOT, color=colour, label=f"FDA, {display(init)}")
    axes.set_yticks(range(len(numbers["tasks"])), numbers["tasks"])
    axes.set_ylim(len(numbers["tasks"]) - 0.5, -0.5)
    lists = [values for each in numbers["panels"] for values in (each["before"], *each["after"].values())]
    axes.set_xlim(0, 1.05 * max(map(max, lists)))  # the panels share their axes

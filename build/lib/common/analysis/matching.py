"""The matching loss along the optimisation of the anchors (paper appendix D): the mean over the tensors of 1 − cos."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from common.analysis.material import Material, Numbers
from common.core.errors import InputError
from common.evaluation.figures import INK, draw_traces


def measure(material: Material) -> Numbers:
    """The trace of each unit, one value before each step and one after the last, and their mean over the tasks.

    Where units end early, the mean is over those that are left.
    """
    if source := material.config.anchors.source:
        raise InputError(f"analyse.py matching needs what construction notes; the anchors of {source} have no trace")
    panels = []
    for init in material.inits:
        for index in material.blocks:
            traces = {task: material.header(init, task, index)["trace"] for task in material.tasks}
            longest = max(map(len, traces.values()))
            mean = [fmean(trace[i] for trace in traces.values() if i < len(trace)) for i in range(longest)]
            panels.append({"title": material.title("", index, init), "traces": traces, "mean": mean})
    return {"panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A line for each task, and their mean."""
    draw_traces(axes, panel["traces"])
    axes.plot(panel["mean"], color=INK, linewidth=2, label="mean")
    traces = [trace for each in numbers["panels"] for trace in each["traces"].values()]
    axes.set_ylim(0, 1.05 * max(map(max, traces)))  # the panels share their axes
    axes.set_xlim(0, max(map(len, traces)))

"""The analyses: one file and one row each.

A file common/analysis/NAME.py has two functions:

    measure(material) -> numbers        what the figure shows, plain numbers under plain names. Under "panels" is a list
                                        with a dictionary for each panel, whose "title" stands above it.
    draw(axes, panel, numbers)          one of these panels on given matplotlib axes

`material` (material.py) reads anchors, inputs of the tasks and models. The formula is a function of its own in the
file, from tensors and plain numbers to the same. Blocks are those of run.blocks; unset, `blocks` says which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from matplotlib.axes import Axes

from common.analysis.material import Material, Numbers

Need = Literal["inputs", "labels"]


@dataclass(frozen=True)
class Analysis:
    """A row.

    title: of the figure. x, y: labels of the axes. size: inches of a panel. columns: of panels in a row, at most.
    needs: what a domain must offer: inputs of the tasks, or also their labels. anchors: what it reads: anchors of every
    initialisation of compare.inits, of anchors.init alone, models adapted on those of compare.inits, or merges, and
    such models where there are some. blocks: which it looks at if run.blocks is unset: a share of the depth each; none
    for all. shared: the panels share their axes. units: it hands its work to run.engine, which sees to threads.
    """

    title: str
    x: str
    y: str
    size: tuple[float, float] = (2.1, 1.8)
    columns: int = 4
    needs: Need | None = None
    anchors: Literal["each", "one", "models", "merges"] = "each"
    blocks: tuple[float, ...] = (1,)
    shared: bool = True
    units: bool = False


# The paper looks at blocks 3, 6 and 12 of 12, at 12 most of all.
ANALYSES = {
    "spectrum": Analysis("Singular values of the anchors along their optimisation", "$k$", "$s_k / s_1$"),
    "subspace": Analysis(
        "Top right singular subspaces: anchors against real features", "construction step", "similarity", needs="inputs"
    ),
    "bias": Analysis(
        "Representation bias before and after FDA",
        "mean $|z - z_t|$",
        "",
        (2.4, 2.6),
        needs="inputs",
        anchors="models",
    ),
    "interference": Analysis(
        "How far the anchors of one task move the outputs of another",
        "task j, whose outputs move",
        "task i, whose anchors ask",
        (3.6, 3.6),
        2,
        shared=False,
    ),
    "blend": Analysis(
        "Between a start and the model adapted from it", "blend t", "against the start", anchors="models", columns=5
    ),
    "residual": Analysis(
        "What merges leave of the interference between tasks",
        "",
        "mean $\\|(M - \\tau_t)\\tau_t^T\\| / \\|\\tau_t\\tau_t^T\\|$",
        (4.4, 4.2),
        anchors="merges",
        blocks=(),
        shared=False,
    ),
    "matching": Analysis("Gradient matching", "construction step", "mean 1 − cos", blocks=(0.25, 0.5, 1), columns=3),
    "tsne": Analysis("t-SNE of tokens: anchors and real features", "", "", (2.2, 2.1), needs="inputs", shared=False),
    "landscape": Analysis(
        "Loss in the plane of pretrained, merged and adapted model",
        "",
        "",
        (5.4, 4.2),
        needs="labels",
        anchors="one",
        blocks=(),
        shared=False,
    ),
    "projection": Analysis(
        "Projection on the cone of real updates",
        "construction step",
        "$\\|\\sum_j \\alpha_j \\Delta w_j\\| / \\|\\tau'\\|$",
        needs="labels",
        units=True,
    ),
}


def functions(name: str) -> tuple[Callable[[Material], Numbers], Callable[[Axes, Mapping[str, Any], Numbers], None]]:
    """measure and draw of an analysis."""
    module = import_module(f"common.analysis.{name}")
    return module.measure, module.draw

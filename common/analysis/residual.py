"""What a merge leaves of the interference between tasks, and how far it goes for it: both without data.

The rows of a task vector τ_t of a layer stand in for the inputs that the layer was trained on, which is what WUDI goes
by. On them the merged model's change M of that layer differs from the expert's by

    r_t = ‖(M − τ_t) τ_tᵀ‖ / ‖τ_t τ_tᵀ‖,

0 where it answers as the expert does, 1 where it answers as the base does. Its mean over layers and tasks stands beside
the length of M, all layers together, in mean lengths of a task vector. A small residual has its price in length: that
of `wudi_exact`, near the least there can be, is reached by a change several times as long as a task vector, along
directions of which the task vectors say little. Every matrix of the blocks counts alike; a fused projection is one.

Source of r_t: the objective of Cheng et al. 2025 (WUDI-Merging, arXiv 2503.08099), divided by its value at M = 0.
Comparing merges by it is ours.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.core.task_vectors import upcast
from common.evaluation.figures import COLOURS, DOT, INK, RING, draw_names
from common.evaluation.rows import read_results, row_name, values_by_name
from common.evaluation.scoring import RESULTS
from common.io.checkpoints import Checkpoint

MERGE: dict[str, Any] = DOT | {"color": COLOURS[0], "label": "merge"}
FDA: dict[str, Any] = RING | {"label": "FDA"}


def residual(delta: Tensor, tau: Tensor) -> float | None:
    """r_t of one matrix: the merged model's change M and the task vector, both (R, D); None of a task vector of 0."""
    whole = (tau @ tau.mT).norm()
    return float(((delta - tau) @ tau.mT).norm() / whole) if whole > 0 else None


def measure(material: Material) -> Numbers:
    """Of each merge, and of each model adapted from one that is there: r_t of every task, length, and Avg if scored.

    rank_correlation: between the mean of r_t and Avg, over the models that are scored.
    """
    material.experiment.require_moved_blocks()
    merges, adapted, avg, names = merges_of(material), adapted_of(material), averages(material), matrices_of(material)
    models, tasks = merges | adapted, material.tasks
    residuals: dict[tuple[str, str], list[float]] = {pair: [] for pair in product(models, tasks)}
    squares = dict.fromkeys([*models, *tasks], 0.0)
    for name in names:
        theta_0 = tensor(material, material.experiment.base, name)
        taus = {task: tensor(material, material.experiment.experts[task], name) - theta_0 for task in tasks}
        for task, tau in taus.items():
            squares[task] += float(tau.norm().square())
        for model, checkpoint in models.items():
            delta = tensor(material, checkpoint, name) - theta_0
            squares[model] += float(delta.norm().square())
            for task, tau in taus.items():
                if (value := residual(delta, tau)) is not None:
                    residuals[model, task].append(value)
    length, found = fmean(math.sqrt(squares[task]) for task in tasks), {}
    for model in models:
        of_tasks = {task: fmean(values) for task in tasks if (values := residuals[model, task])}
        found[model] = {"residual": of_tasks, "mean": fmean(of_tasks.values()), "adapted": model in adapted}
        found[model] |= {"length": math.sqrt(squares[model]) / length, "avg": avg.get(model)}
    scored = [(model["mean"], model["avg"]) for model in found.values() if model["avg"] is not None]
    panels = [{"title": "against length", "x": "length, in task vectors", "of": "length"}]
    panels += [{"title": "against the score", "x": "Avg", "of": "avg"}] if scored else []
    return {"matrices": len(names), "models": found, "rank_correlation": rank_correlation(scored), "panels": panels}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None of fewer than three pairs, or where all values of one side are equal."""
    from scipy.stats import spearmanr  # half a second, of which no other analysis has need

    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    found: Any = spearmanr(pairs)
    return float(found.statistic)


def matrices_of(material: Material) -> list[str]:
    """Names of the matrices of the blocks looked at."""
    base, prefixes = material.experiment.base, [material.experiment.prefixes[index] for index in material.blocks]
    return [name for prefix in prefixes for name, shape in base.shapes_under(prefix).items() if len(shape) == 2]


def merges_of(material: Material) -> dict[str, Checkpoint]:
    """{name of its row: model} of every start."""
    return {row_name({"method": start}): material.start(start) for start in material.config.compare.starts}


def adapted_of(material: Material) -> dict[str, Checkpoint]:
    """{name of its row: model} of the adapted models that are there."""
    kept = {"method": "fda", "label": material.config.adapt.label}
    pairs = product(material.config.compare.starts, material.inits)
    return {
        row_name(kept | {"start": start, "init": init}): model
        for start, init in pairs
        if (model := material.adapted_if_there(start, init))
    }


def tensor(material: Material, checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a model, on the device, in float32 or wider."""
    return upcast(material.experiment.read(checkpoint, [name])[name])


def averages(material: Material) -> dict[str, float]:
    """{row name: Avg} of the models that the run has scored on every test set."""
    file = material.config.run.dir / RESULTS
    if not file.is_file():
        return {}
    values = values_by_name(*read_results(file))
    return {name: of[-1] for name, of in values.items() if not math.isnan(of[-1])}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A dot for each merge and a ring for each adapted model, by name."""
    models, places = numbers["models"], {}
    for name, model in models.items():
        if model[panel["of"]] is not None:
            places[name] = (model[panel["of"]], model["mean"])
            look = FDA if model["adapted"] else MERGE
            axes.plot(*places[name], **look)
    axes.set_xlabel(panel["x"], fontsize=10, color=INK)
    axes.set_ylim(0, 1.08 * max(y for _, y in places.values()))
    axes.margins(x=0.2)
    draw_names(axes, places)

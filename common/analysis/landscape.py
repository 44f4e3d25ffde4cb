"""The loss landscape between the pretrained, the merged and the adapted model (paper Fig. 2).

The plane is ours, for the paper does not say how its own is made: through the pretrained model θ₀, the merge θ_m of
start.method (of task arithmetic where that is the pretrained model), and the adapted model θ_a, over all tensors that
are merged,

    θ(a, b) = θ₀ + a e₁ + b e₂,    e₁ ∥ θ_m − θ₀,    e₂ ∥ (θ_a − θ₀) less its part along e₁,    ‖e₁‖ = ‖e₂‖ = 1,

so that distances in it are those of the weights. The three models lie in it exactly. Of the merge's coefficient, from 0
to its own value, the path is a part of the first axis; of the adaptation, repeated epoch by epoch, it is projected
onto the plane, and `inside` says which part of the displacement from θ₀ lies in it. The loss is the mean over the tasks
of that with which they are fine-tuned, on examples of their test sets.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from torch import Tensor

from common.analysis.material import Material, Numbers
from common.config import PRETRAINED
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import Params, add, inner, subtract
from common.domain import first_tests
from common.evaluation.figures import COLOURS, INK
from common.evaluation.rows import display
from common.experiment import Experiment
from common.fda.adaptation import fit_block
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample
from common.pipeline import fit_problem
from common.run.progress import counted

EXAMPLES, BATCH = 48, 24  # of each task
POINTS, MARGIN = 13, 0.3  # of the grid, along each axis; what lies around the models, of their extent


def scaled(a: Params, factor: float) -> Params:
    return {name: factor * p for name, p in a.items()}


def plane(first: Params, second: Params) -> tuple[Params, Params]:
    """Orthonormal e₁ and e₂ of two displacements (Gram-Schmidt); InputError if they lie on one line."""
    e_1 = scaled(first, inner(first, first) ** -0.5)
    rest = add(second, e_1, -inner(second, e_1))
    length = inner(rest, rest) ** 0.5
    if not length > 1e-6 * inner(second, second) ** 0.5:
        raise InputError("pretrained, merged and adapted model lie on one line, through which there is no one plane")
    return e_1, scaled(rest, 1 / length)


def measure(material: Material) -> Numbers:
    """Loss on the grid, the three models with theirs, and both paths."""
    config, theta_0 = material.config, material.base()
    method, init = config.start.method, material.inits[0]
    if (blend := config.adapt.for_start(method).blend) != 1:
        raise InputError(f"analyse.py landscape follows the adaptation to its end, but adapt.blend is {blend}")
    merge = method if method != PRETRAINED else "ta"
    merged = subtract(material.read(material.start(merge)), theta_0)
    adapted = subtract(material.read(material.adapted(method, init)), theta_0)
    axes = plane(merged, adapted)
    ends = {"Pretrained": scaled(merged, 0), display(merge): merged, "FDA": adapted}
    path, inside = adaptation_path(material, axes, adapted, init)
    reach = [(inner(delta, axes[0]), inner(delta, axes[1])) for delta in ends.values()]
    grids = [spanned([place[i] for place in [*reach, *path]]) for i in (0, 1)]
    loss = mean_loss(material)
    rows = counted(grids[1], "landscape")
    losses = [[loss(add(add(theta_0, axes[0], float(a)), axes[1], float(b))) for a in grids[0]] for b in rows]
    models = {
        name: {"at": place, "loss": loss(add(theta_0, delta))}
        for (name, delta), place in zip(ends.items(), reach, strict=True)
    }
    panel = {"title": f"FDA from {display(method)}, {display(init)}", "grid": grids, "losses": losses}
    return {"examples": EXAMPLES, "panels": [panel | {"models": models, "adaptation": path, "inside": inside}]}


def spanned(places: list[float]) -> Tensor:
    """POINTS coordinates that go beyond these on both sides."""
    low, high = min(places), max(places)
    beyond = MARGIN * (high - low)
    return torch.linspace(low - beyond, high + beyond, POINTS, dtype=torch.float64)


def mean_loss(material: Material) -> Callable[[Params], float]:
    """θ -> the mean over the tasks of the loss on their examples."""
    domain, config, held_out = material.domain, material.config, []
    assert domain.labelled_task  # a domain without is refused
    for task in material.tasks:
        sample = Sample("test", EXAMPLES, BATCH, config.run.seed)
        labelled = domain.labelled_task(config, first_tests(config, domain)[task], sample, material.device)
        batches = [labelled.batch(n.tolist()) for n in torch.arange(labelled.examples).split(BATCH)]
        held_out.append((labelled.loss, [(len(batch["labels"]) / labelled.examples, batch) for batch in batches]))

    @torch.no_grad()
    def loss(theta: Params) -> float:
        each = [sum(share * float(of(theta, batch)) for share, batch in batches) for of, batches in held_out]
        return sum(each) / len(each)

    return loss


def adaptation_path(
    material: Material, axes: tuple[Params, Params], adapted: Params, init: str
) -> tuple[list[list[float]], list[float]]:
    """Where the adaptation is before the first epoch and after each, and how much of its displacement is in the plane.

    Every block is fitted as adaptation fits it; what lies outside the blocks is that of the adapted model throughout.
    """
    experiment, start = material.at(init), material.start(material.config.start.method)
    rest = {name: adapted[name] for name in experiment.rest_names()}
    total = torch.tensor([*(inner(rest, axis) for axis in axes), inner(rest, rest)], dtype=torch.float64)
    for index in counted(range(experiment.depth), "adaptation"):
        total = total + block_path(experiment, start, index, axes)
    places, length = total[:, :2], total[:, 2].sqrt()
    inside = torch.where(length > 0, places.norm(dim=1) / length, 1.0)
    return places.tolist(), inside.tolist()


def block_path(experiment: Experiment, start: Checkpoint, index: int, axes: tuple[Params, Params]) -> Tensor:
    """⟨δ, e₁⟩, ⟨δ, e₂⟩ and ‖δ‖² of a block's displacement δ from θ₀: (E + 1, 3), before E epochs and after each."""
    trained, x_ATD, y_ATD = fit_problem(experiment, start, index)
    theta_0, prefix = experiment.read_block(experiment.base, index), experiment.prefixes[index]
    e_1, e_2 = ({name: axis[prefix + name] for name in theta_0} for axis in axes)
    rows: list[list[float]] = []

    @torch.no_grad()
    def note(*_: float) -> None:
        delta = subtract(trained.build(trained.params), theta_0)  # fitting moves the tensors of `params` in place
        rows.append([inner(delta, e_1), inner(delta, e_2), inner(delta, delta)])

    note()
    how, generator = experiment.fit_settings(), seeded(experiment.config.run.seed, "adapt", index)
    fit_block(experiment.functions[index], trained, x_ATD, y_ATD, how, generator=generator, progress=note)
    return torch.tensor(rows, dtype=torch.float64)


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """The loss as a surface, the three models, and the paths between them."""
    a, b = panel["grid"]
    surface = axes.contourf(a, b, panel["losses"], levels=18, cmap="cividis_r")
    axes.figure.colorbar(surface, ax=axes, label="loss, mean over the tasks")
    edge = [patheffects.withStroke(linewidth=3.2, foreground="white")]
    merge, merged = list(panel["models"].items())[1]
    line = {"linewidth": 1.8, "path_effects": edge}
    axes.plot(
        [0, merged["at"][0]], [0, merged["at"][1]], color=COLOURS[1], label=f"{merge}, coefficient from 0", **line
    )
    axes.plot(*zip(*panel["adaptation"], strict=True), color=COLOURS[0], label="adaptation", **line)
    for (name, model), marker in zip(panel["models"].items(), "osD", strict=True):
        axes.plot(
            *model["at"], marker, color="white", markeredgecolor=INK, markersize=7, label=f"{name}: {model['loss']:.2f}"
        )
    axes.set_xlabel("$a$, along the merge")
    axes.set_ylabel("$b$, along the adapted model, at right angles to it")
    axes.grid(False)

"""Does FDA go where fine-tuning goes? The projection of its direction on the cone of real updates (paper section 5).

A real fine-tuning of the whole model, from the pretrained model and from task arithmetic, makes 512 updates
Δw_1 … Δw_512 of a block. With τ' the displacement of that block when it is adapted on the anchors of this task alone,
from the same model, as adapt.py would,

    α* = argmin_{α ≥ 0} ‖τ' − Σ_j α_j Δw_j‖²,    ratio = ‖Σ_j α*_j Δw_j‖ / ‖τ'‖,

a norm ratio: 1 if τ' is in the cone of the updates, 0 if it makes an angle of 90° or more with each. The reference is
the same of the expert's own displacement θ_t − θ. Attention and MLP each by themselves, and the mean of both; norms
outside both are left out. The paper shows the mean, of two tasks.

The paper leaves open what τ' is (one gradient, or an adaptation): an adaptation here. Ours too: the rate of the
fine-tuning is adapt's from the pretrained model, which is that of the experts in the paper's settings, and constant;
from task arithmetic the paper's reference is an epoch of another fine-tuning, here it is what is left to the expert.
The updates are kept in memory, 2 KiB for each weight that is looked at: 13.5 GiB of a block of ViT-B/32.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from scipy.optimize import nnls
from torch import Tensor

from common.analysis.finetuning import flat, update_vectors
from common.analysis.material import Material, Numbers, plain
from common.config import PRETRAINED
from common.core.blocks import BlockFamily, BlockModule
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import Params, subtract
from common.domain import first_tests, module_of
from common.evaluation.figures import COLOURS, INK
from common.evaluation.rows import display
from common.experiment import FIT, Experiment
from common.fda.adaptation import fit_block
from common.io.checkpoints import Checkpoint, write_text
from common.io.examples import Sample
from common.opening import carry_out
from common.pipeline import trainable
from common.run.engine import Memory
from common.run.progress import UnitBar, Units

UPDATES = 512  # the paper's
BATCH = 32  # examples of an update
STARTS, PARTS = (PRETRAINED, "ta"), ("attention", "MLP", "mean")
MODELS = 6  # as many weights as models are held beside the updates: θ, its gradient, both moments, θ₀ and θ_t
PIECE = 2**14  # weights whose updates are converted to float64 at once
ROUNDING = 1e-10  # eigenvalues of the Gram matrix up to this part of the largest count as zero

Progress = Callable[[float, float], None]


class Cone:
    """All sums Σ_j α_j Δw_j of update vectors Δ (U, N) with α ≥ 0.

    Held beside the vectors: a root R of their Gram matrix, RᵀR = ΔΔᵀ, over its nonzero eigenvalues. With it
    ‖v − Δᵀα‖² is ‖R⁺ᵀΔv − Rα‖² and what does not depend on α: non-negative least squares of at most U equations.
    """

    def __init__(self, updates_UN: Tensor):
        self.updates_UN, count = updates_UN, len(updates_UN)
        gram = updates_UN.new_zeros(count, count, dtype=torch.float64)
        for some in updates_UN.split(PIECE, dim=1):
            wide = some.double()
            gram.addmm_(wide, wide.mT)
        values, vectors = torch.linalg.eigh(gram)
        keep = values > ROUNDING * values[-1]
        self.sizes, self.basis = values[keep].sqrt(), vectors[:, keep]

    def ratio(self, target_N: Tensor) -> float:
        """‖p‖ / ‖v‖ of a vector v and its projection p on the cone; 0 of v = 0."""
        length = target_N.double().norm()
        if not len(self.sizes) or not length > 0:
            return 0.0
        inner = self.basis.new_zeros(len(self.updates_UN))
        for some, of_target in zip(self.updates_UN.split(PIECE, dim=1), target_N.split(PIECE), strict=True):
            inner += some.double() @ of_target.double()
        root, target = self.sizes[:, None] * self.basis.mT, self.basis.mT @ inner / self.sizes
        alpha, _ = nnls(root.cpu().numpy(), target.cpu().numpy(), maxiter=100 * len(self.updates_UN))
        return float((root @ torch.from_numpy(alpha).to(root)).norm() / length)


def attention_and_mlp(family: BlockFamily, module: BlockModule, theta: Params, x_ATD: Tensor) -> dict[str, list[str]]:
    """Names of a block's tensors, within it: those of the part that looks at other tokens, and those of the others that
    have a matrix.

    No name tells them apart: the attention is the first part whose output at one token depends on another.
    Raises: InputError if there is no such part, or no other with a matrix.
    """
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, output: Any) -> None:
        seen.append((name, output[0] if isinstance(output, tuple) else output))

    block, parts = family.pure(module.module), dict(module.module.named_children())
    hooks = [part.register_forward_hook(lambda _, __, y, n=name: see(n, y)) for name, part in parts.items()]
    other = x_ATD.clone()
    other[:, 0] = x_ATD[:, 0].flip(-1) + 1
    with torch.no_grad():
        for x in (x_ATD, other):
            block(theta, x)
    for hook in hooks:
        hook.remove()
    half = len(seen) // 2
    mixes = (n for (n, y), (_, z) in zip(seen[:half], seen[half:], strict=True) if not torch.equal(y[:, 1:], z[:, 1:]))
    attention = next(mixes, None)
    found: dict[str, list[str]] = {"attention": [], "MLP": []}
    for name, part in parts.items():
        if name == attention or any(p.ndim == 2 for p in part.parameters()):
            names = [f"{name}.{within}" for within, _ in part.named_parameters()]
            found["attention" if name == attention else "MLP"] += names
    if not all(found.values()):
        raise InputError(f"analyse.py projection finds no attention and MLP in {module.prefix}, but {', '.join(parts)}")
    return found


def adapted_alone(experiment: Experiment, start: Checkpoint, index: int, task: str, x_ATD: Tensor) -> Params:
    """τ': how far a block goes from the start when it is adapted to one expert on its anchors x."""
    block, how = experiment.functions[index], experiment.fit_settings()
    theta_0, theta_t = (experiment.read_block(c, index) for c in (experiment.base, experiment.experts[task]))
    trained = trainable(experiment, start, index, theta_0)
    with torch.no_grad():
        y_ATD = block(theta_t, x_ATD)
        theta = {name: p.clone() for name, p in trained.build(trained.params).items()}
    how = replace(how, batch_size=min(how.batch_size, len(x_ATD)))
    generator = seeded(experiment.config.run.seed, "projection", task, index)
    return subtract(fit_block(block, trained, x_ATD, y_ATD, how, generator=generator)[0], theta)


def measure(material: Material) -> Numbers:
    """For each start, task and block the ratio at each step that the anchors were kept at, of both parts of the block
    and their mean. A start and a task are a unit of work, which goes wherever run.engine lets it be done."""
    experiment, units = material.experiment, list(product(STARTS, material.tasks))
    for start in STARTS:
        material.start(start)  # merged before any unit reads it
    folder = material.config.run.dir / "analysis" / "projection"

    def file(unit: tuple[str, str]) -> Path:
        return folder / f"{'-'.join(unit)}.json"

    weights = sum(math.prod(shape) for shape in experiment.base.shapes_under(experiment.family.scope).values())
    block = max(map(sum, experiment.matrices.values()))
    held = 4.0 * (UPDATES * block * len(material.blocks) + MODELS * weights)
    forecast = {
        "seconds": UPDATES * experiment.depth * experiment.step_seconds(FIT * BATCH),
        "memory": lambda: Memory(held, held, held),
    }
    shutil.rmtree(folder, ignore_errors=True)  # what an end before time left
    bar = UnitBar("projection", len(units), "fine-tunings")
    with bar:
        what = (material.blocks, material.tasks, material.inits, material.runs, folder, UPDATES)
        carry_out(panels_each, experiment, units, bar, *what, writes=lambda unit: [file(unit)], **forecast)
    panels = [panel for unit in units for panel in json.loads(file(unit).read_text(encoding="utf-8"))]
    shutil.rmtree(folder)
    panels.sort(key=lambda panel: panel["block"])
    return {"updates": UPDATES, "batch": BATCH, "panels": panels}


def panels_each(experiment: Experiment, units: Iterable[tuple[str, str]], bar: Units, *what: Any) -> None:
    """The panels of some starts and tasks, a file each; the starts are there."""
    *looked_at, folder, updates = what
    material = Material(module_of(experiment.config.domain), experiment, *looked_at)
    for start, task in units:
        with bar.unit(f"{task} from {display(start)}"):
            panels = panels_of(material, material.start(start), start, task, updates, bar.advance)
            write_text(folder / f"{start}-{task}.json", json.dumps(plain(panels)))


def panels_of(
    material: Material, checkpoint: Checkpoint, start: str, task: str, count: int, progress: Progress
) -> list[dict[str, Any]]:
    """A panel for each block: one fine-tuning of the start θ on one task, and what of τ' lies in their cone."""
    theta, parts = material.read(checkpoint), parts_of(material, checkpoint)
    names = {key: [material.experiment.prefixes[key[0]] + name for name in within] for key, within in parts.items()}
    updates = updates_of(material, task, start, theta, list(names.values()), count, progress)
    cones = {key: Cone(updates_UN) for key, updates_UN in zip(parts, updates, strict=True)}
    left = subtract(material.expert(task), theta)
    panels = []
    for index in material.blocks:
        keys = [(index, part) for part in PARTS[:2]]
        curves: dict[str, dict[str, dict[int, float]]] = {part: {} for part in PARTS}
        for init in material.inits:
            for step, x_ATD in material.path(init, task, index).items():
                delta = adapted_alone(material.at(init, start), checkpoint, index, task, x_ATD)
                found = with_mean([cones[key].ratio(flat(delta, parts[key])) for key in keys])
                for part, ratio in found.items():
                    curves[part].setdefault(init, {})[step] = ratio
        reference = with_mean([cones[key].ratio(flat(left, names[key])) for key in keys])
        block = f", block {index}" if len(material.blocks) > 1 else ""
        panel = {"title": f"{task} from {display(start)}{block}", "block": index}
        panels.append(panel | {"reference": reference, "curves": curves})
    return panels


def parts_of(material: Material, checkpoint: Checkpoint) -> dict[tuple[int, str], list[str]]:
    """{(block, part): names of tensors within the block}, of the blocks that are looked at."""
    experiment = material.experiment
    modules = experiment.family.modules(material.domain.skeleton(material.config.model))
    x_ATD = torch.randn(2, *experiment.shape[1:], generator=seeded(0, "projection")).to(material.device)
    return {
        (index, part): names
        for index in material.blocks
        for part, names in attention_and_mlp(
            experiment.family, modules[index], experiment.read_block(checkpoint, index), x_ATD
        ).items()
    }


def with_mean(ratios: list[float]) -> dict[str, float]:
    """{part: ratio} of both parts, and their mean."""
    return dict(zip(PARTS, [*ratios, sum(ratios) / len(ratios)], strict=True))


def updates_of(
    material: Material,
    task: str,
    start: str,
    theta: Params,
    parts: list[list[str]],
    count: int,
    progress: Progress,
) -> list[Tensor]:
    """The update vectors of a fine-tuning of θ on the training set of a task."""
    config, domain = material.config, material.domain
    assert domain.labelled_task  # a domain without is refused
    sample = Sample("train", None, BATCH)
    labelled = domain.labelled_task(config, first_tests(config, domain)[task], sample, material.device)
    rate, label = config.adapt.for_start(PRETRAINED).lr, f"{task} from {display(start)}"
    how = {"updates": count, "batch": min(BATCH, labelled.examples), "lr": rate}
    return update_vectors(labelled, theta, parts, **how, seed=config.run.seed, label=label, progress=progress)


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A line for each initialisation, and the expert's own displacement; both parts are thin beside their mean."""
    axes.axhline(panel["reference"]["mean"], color=INK, linestyle="--", linewidth=1.2, label="expert")
    for part, line in zip(PARTS, (":", "--", "-"), strict=True):
        mean = part == "mean"
        how = {"linestyle": line, "linewidth": 1.3 if mean else 0.7, "marker": "o" if mean else "", "markersize": 3}
        for (init, curve), colour in zip(panel["curves"][part].items(), COLOURS, strict=False):
            label = f"{display(init)}{'' if mean else f', {part}'}"
            axes.plot(list(map(int, curve)), curve.values(), color=colour, label=label, **how)
    axes.set_ylim(0, 1)

"""Functional Dual Anchors in two boxes (paper Algorithm 1): construct the anchors, adapt the merged model on them.

Box 1, `construct`. For every block φ and every task t:              a formula's home in common/fda/
    θ₀, θ_t: the block's weights in base and expert; τ = θ_t − θ₀
    x: rows of θ_t, or Gaussian noise                                  initial_anchors, anchors.py
    repeat x ← x − η ∂/∂x Σ_p 1 − cos(−∂Dist/∂θ_p, τ_p),               optimise_anchors, construction.py
        Dist = Dist(φ(θ; x), φ(θ_t; x)) at θ = θ₀  (Eq. 1)             matching_loss, matching.py
    store the best x (a step is AdamW's or Muon's)
Box 2, `adapt`. For every block φ:
    read the anchors x_t of every task, compute the targets φ(θ_t; x_t)
    θ: that of the pretrained model, or of a merge  (Eq. 5, 6)         own_weights, coefficients, adaptation.py
    repeat θ ← θ − η ∂/∂θ Σ_t Dist(φ(θ; x_t), φ(θ_t; x_t))  (Eq. 4)    fit_block, adaptation.py
    store θ
Then put the merged model together from its blocks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.assembly import assemble, remove_pieces, require_free
from common.config import PRETRAINED, Config
from common.core.seeding import seeded
from common.core.task_vectors import Params, subtract
from common.descent import check_compared
from common.domain import Domain
from common.evaluation.cards import write_cards
from common.evaluation.scoring import score_run
from common.experiment import Experiment, Unit
from common.fda.adaptation import Trainable, coefficients, fit_block, own_weights, regmean_warm_start
from common.fda.anchors import initial_anchors
from common.fda.construction import OptimisedAnchors, SearchSettings, optimise_anchors, optimise_together
from common.fda.matching import MatchingProblem
from common.fda.precision import effective_precision
from common.io.anchor_files import save_anchors, save_snapshots
from common.io.checkpoints import Checkpoint, check_provenance, read_header, write_tensors
from common.layout import RunLayout
from common.opening import carry_out, open_stage
from common.planning.cost import memory_of_adaptation, memory_of_construction
from common.provenance import (
    anchor_provenance,
    anchors_of,
    block_provenance,
    fit_provenance,
    is_finished,
    require_anchors,
    require_own_anchors,
)
from common.run.background import read_ahead, write_behind
from common.run.progress import UnitBar, Units
from common.run.run_log import record_stage
from common.start import merge_start, opened_start, require_merge


def construct(config: Config, domain: Domain) -> None:
    """Box 1: for every block and every task, make anchors whose induced gradient points along the task vector.

    A block and a task are a unit; with anchors.together the units of a block are optimised in one go. InputError if
    there are anchors made elsewhere.
    """
    require_own_anchors(config)
    experiment = open_stage(config, domain)
    experiment.require_moved_blocks()
    bar, layout = UnitBar("construct", len(experiment.blocks) * len(config.tasks)), RunLayout(config)
    with record_stage(config, f"construct {config.anchors.init}", bar), bar:
        forecast = {"seconds": experiment.construct_seconds, "memory": partial(memory_of_construction, config, domain)}
        carry_out(construct_each, experiment, experiment.units, bar, writes=layout.anchor_files, **forecast)


def construct_each(experiment: Experiment, units: Iterable[Unit], bar: Units) -> None:
    """Box 1 for some units, each a block and one task, or all tasks: in one process, one after the other."""
    with write_behind() as write:
        for index, theta_0, thetas in read_ahead(experiment.read_units(units)):
            with bar.unit(f"{' + '.join(thetas)}, block {index}", len(thetas)):
                construct_units(experiment, index, theta_0, thetas, bar, write)


def construct_units(
    experiment: Experiment,
    index: int,
    theta_0: Params,
    thetas: Mapping[str, Params],
    bar: Units,
    write: Callable[..., None],
) -> None:
    """Make and store the anchors of one block for every task in `thetas` (θ_t), unless all their files are there."""
    layout = RunLayout(experiment.config)
    files = {task: layout.anchor_file(task, index) for task in thetas}
    provenance = {task: anchor_provenance(experiment, task, index, theta_0, thetas[task]) for task in thetas}
    steps = {"snapshots": sorted(experiment.config.anchors.snapshots)}
    snapshots = {task: layout.snapshot_file(task, index) for task in thetas if steps["snapshots"]}
    with_steps = {task: made | steps for task, made in provenance.items()}
    there = [all_there(files, provenance), all_there(snapshots, with_steps)]  # both are checked, whatever is missing
    if all(there):
        return bar.keep(len(files))
    # task vectors τ = θ_t − θ₀, and initial anchors
    problems = matching_problems(experiment, index, theta_0, thetas)
    x_inits = [initial_anchors_of(experiment, t, index, p.theta_t) for t, p in zip(thetas, problems, strict=True)]
    # minimise the matching loss over the anchors
    found = search_anchors(experiment, problems, x_inits, bar)
    for (task, file), best in zip(files.items(), found, strict=True):
        outcome = {"steps_done": max(0, len(best.trace) - 1), "best_step": best.best_step}
        outcome |= {"losses": best.losses, "trace": best.trace}
        positions = experiment.positions(task)
        if not file.is_file():  # it is there if it was made before snapshots were asked for
            write(save_anchors, file, best.x + positions, provenance[task] | outcome)
        if task in snapshots:
            kept = {step: x_ATD + positions.cpu() for step, x_ATD in best.snapshots.items()}
            write(save_snapshots, snapshots[task], kept, with_steps[task])


def all_there(files: Mapping[str, Path], provenance: Mapping[str, dict[str, Any]]) -> bool:
    """Whether no file is missing. Raises: InputError if one that is there was made from something else."""
    there = [task for task, file in files.items() if file.is_file()]
    for task in there:
        check_provenance(files[task], read_header(files[task]), provenance[task])
    return len(there) == len(files)


def matching_problems(
    experiment: Experiment, index: int, theta_0: Params, thetas: Mapping[str, Params]
) -> list[MatchingProblem]:
    """What the anchors of one block have to match, for every task in `thetas` (θ_t): the task vector τ, at θ₀."""
    taus = [experiment.matched(experiment.task_vector(task, theta_0, theta_t)) for task, theta_t in thetas.items()]
    block, theta_0 = experiment.matched_function(index, theta_0), experiment.matched(theta_0)
    weights = experiment.config.anchors.weights
    return [
        MatchingProblem(block, theta_0, experiment.matched(theta_t), tau, experiment.positions(task), weights)
        for (task, theta_t), tau in zip(thetas.items(), taus, strict=True)
    ]


def initial_anchors_of(experiment: Experiment, task: str, index: int, theta_t: Params) -> Tensor:
    """The anchors x_ATD of one block and one task before the first step."""
    generator = seeded(experiment.config.run.seed, "anchors", task, index)
    scheme, scale = experiment.config.anchors.init, experiment.anchor_scale()
    x_ATD = initial_anchors(scheme, experiment.shape, theta_t=theta_t, scale=scale, generator=generator)
    return x_ATD.to(experiment.device)


def search_anchors(
    experiment: Experiment, problems: Sequence[MatchingProblem], x_inits: Sequence[Tensor], bar: Units
) -> list[OptimisedAnchors]:
    """Optimise the anchors of one block for some tasks, as the config says."""
    config, theta_0 = experiment.config.anchors, problems[0].theta_0
    settings = SearchSettings(
        steps=config.steps,
        lr=config.lr,
        optimizer=config.optimizer,
        schedule=config.schedule,
        distance=config.distance,
        stop_loss=config.stop_loss,
        patience=config.patience,
        precision=effective_precision(
            experiment.config.run.precision, experiment.device, theta_0, x_inits[0][: config.chunk]
        ),
        snapshots=tuple(config.snapshots),
    )

    def progress(step: int, loss: float) -> None:
        bar.advance(len(problems) * step / max(1, config.steps), loss)

    if config.together != "no":
        return optimise_together(problems, x_inits, settings, compiler=config.together, progress=progress)
    pairs = zip(problems, x_inits, strict=True)
    return [optimise_anchors(p, x, settings, chunk=config.chunk, progress=progress) for p, x in pairs]


def adapt(config: Config, domain: Domain) -> Path | None:
    """Box 2: for every block, fit the merged block to each expert's outputs on its anchors; put the model together.

    Returns: the folder of the merged checkpoint, which stock libraries open; None while blocks are made elsewhere.
    """
    experiment = open_stage(config, domain)
    domain.check_export(config.model)
    folder = RunLayout(config).adapted
    require_free(folder)
    require_anchors(experiment)
    check_compared(experiment, domain)
    start = merge_start(experiment, domain)
    provenance = fit_provenance(experiment, start)
    if is_finished(folder, provenance):
        remove_pieces(folder)  # which a kill can have left
    else:
        adapt_blocks(experiment, domain, provenance)
        assemble(experiment, domain, start, provenance)
    if config.run.score:
        score_run(config, domain)
    write_cards(config, domain)
    return folder if is_finished(folder, provenance) else None


def adapt_blocks(experiment: Experiment, domain: Domain, provenance: Mapping[str, Any]) -> None:
    """Fit and store every merged block; the start is there."""
    config, layout = experiment.config, RunLayout(experiment.config)
    bar = UnitBar(f"adapt {layout.adapted.name}", len(experiment.blocks), "blocks")
    with record_stage(config, bar.stage, bar), bar:
        forecast = {"seconds": experiment.adapt_seconds, "memory": partial(memory_of_adaptation, config, domain)}
        files = {"reads": layout.files_for_block, "writes": layout.block_files}
        carry_out(adapt_each, experiment, experiment.blocks, bar, block_provenance(provenance), **files, **forecast)


def adapt_each(experiment: Experiment, blocks: Iterable[int], bar: Units, provenance: dict) -> None:
    """Box 2 for some blocks, one after the other; the start is there."""
    start = opened_start(experiment)
    for index in blocks:
        with bar.unit(f"block {index}"):
            adapt_block(experiment, start, index, provenance, bar)


def adapt_block(experiment: Experiment, start: Checkpoint, index: int, provenance: dict, bar: Units) -> None:
    """Fit and store one merged block, unless its file is there already."""
    file = RunLayout(experiment.config).block_file(index)
    if file.is_file():
        check_provenance(file, read_header(file), provenance)
        return bar.keep()
    trained, x_ATD, y_ATD = fit_problem(experiment, start, index)
    # minimise the distance to the experts' outputs
    generator = seeded(experiment.config.run.seed, "adapt", index)
    how, block = experiment.fit_settings(), experiment.functions[index]
    merged, trace = fit_block(block, trained, x_ATD, y_ATD, how, generator=generator, progress=bar.advance)
    write_tensors(file, merged, provenance | {"trace": trace})


def fit_problem(experiment: Experiment, start: Checkpoint, index: int) -> tuple[Trainable, Tensor, Tensor]:
    """The merged block before the first step, the anchors of every task, and the outputs φ(θ_t; x) of its expert
    there, in the order of the tasks.
    """
    config, block = experiment.config, experiment.functions[index]
    theta_0 = experiment.read_block(experiment.base, index)
    inputs, targets = [], []
    for task, expert in experiment.experts.items():
        theta_t = experiment.read_block(expert, index)
        inputs.append(anchors_of(experiment, task, index, theta_0, theta_t))
        with torch.no_grad():
            targets.append(block(theta_t, inputs[-1]))
    trained = trainable(experiment, start, index, theta_0)
    theta_0 = theta_t = None  # a block can fill a machine
    settings = config.adapt.for_start(config.start.method)
    if settings.warm_start == "regmean":
        thetas = (experiment.read_block(expert, index) for expert in experiment.experts.values())
        trained = regmean_warm_start(block, trained, zip(thetas, inputs, strict=True), settings.ridge)
    return trained, torch.cat(inputs), torch.cat(targets)


def trainable(experiment: Experiment, start: Checkpoint, index: int, theta_0: Params) -> Trainable:
    """The merged block as a function of what is trained: from the pretrained model its weights (paper Eq. 5); from TA
    a coefficient for each weight of each task vector, from any other start one for each weight of its one merged task
    vector (paper Eq. 6).
    """
    config = experiment.config
    if config.start.method == PRETRAINED:
        return own_weights(theta_0)
    if config.has_coefficients_per_task:
        thetas = (experiment.read_block(expert, index) for expert in experiment.experts.values())
        return coefficients(theta_0, (subtract(theta_t, theta_0) for theta_t in thetas), ta_scales(experiment))
    return coefficients(theta_0, [subtract(experiment.read_block(start, index), theta_0)], [1.0])


def ta_scales(experiment: Experiment) -> list[float]:
    """λ of each task in task arithmetic."""
    scale = experiment.hyper("ta")["scale"]
    return list(scale) if isinstance(scale, list | tuple) else [scale] * len(experiment.config.tasks)


def merge_alone(config: Config, domain: Domain) -> Path:
    """The start by itself: merge in parameter space, write the checkpoint, score it."""
    require_merge(config)
    experiment = open_stage(config, domain, anchored=False)
    domain.check_export(config.model)
    check_compared(experiment, domain)
    start = merge_start(experiment, domain)
    if config.run.score:
        score_run(config, domain)
    write_cards(config, domain)
    return start.path

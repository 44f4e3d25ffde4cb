"""Functional Dual Anchors in two boxes (paper Algorithm 1): construct the anchors, adapt the merged model on them."""

from collections.abc import Callable
from pathlib import Path

import torch

from common.adaptation import Trainable, coefficients, fit_block, own_weights, warmed
from common.anchors import initial_anchors, save_anchors, seeded
from common.checkpoints import Checkpoint, check_provenance, read_header, write_tensors
from common.config import Config
from common.construction import optimise_anchors
from common.experiment import PRETRAINED, Domain, Experiment, open_experiment
from common.merged import assemble, block_file, fit_provenance, is_finished, merge_start, remove_blocks, result_dir
from common.runtime import UnitBar, read_ahead, recorded, written_behind
from common.scoring import score_run
from common.task_vectors import Params, subtract


def construct(config: Config, domain: Domain) -> None:
    """Box 1: for every block, for every task, make anchors whose induced gradient points along the task vector."""
    experiment = open_experiment(config, domain)
    units = len(experiment.blocks) * len(config.tasks)
    stage = recorded(config, f"construct {config.anchors.init}")
    with stage, UnitBar("construct", units) as bar, written_behind() as write:
        for index, task, theta_0, theta_t in read_ahead(experiment.units()):
            with bar.unit(f"{task}, block {index}"):
                construct_unit(experiment, task, index, theta_0, theta_t, bar, write)


def construct_unit(
    experiment: Experiment,
    task: str,
    index: int,
    theta_0: Params,
    theta_t: Params,
    bar: UnitBar,
    write: Callable[..., None],
) -> None:
    """Make the anchors of one block and one task, unless their file is there already."""
    config, file = experiment.config.anchors, experiment.anchor_file(task, index)
    provenance = experiment.anchor_provenance(task, index, theta_0, theta_t)
    if file.is_file():
        check_provenance(file, read_header(file), provenance)
        return bar.keep()
    tau = experiment.task_vector(task, theta_0, theta_t)
    generator = seeded(experiment.config.run.seed, "anchors", task, index)
    x_init = initial_anchors(
        config.init, experiment.shape, theta_t=theta_t, scale=experiment.anchor_scale(), generator=generator
    )
    positions_TD = experiment.positions(task)
    found = optimise_anchors(
        lambda theta, x_ATD: experiment.block(theta, x_ATD + positions_TD),
        theta_0,
        theta_t,
        x_init.to(experiment.device),
        tau=tau,
        steps=config.steps,
        lr=config.lr,
        optimizer=config.optimizer,
        schedule=config.schedule,
        distance=config.distance,
        chunk=config.chunk,
        precision=experiment.config.run.precision,
        stop_loss=config.stop_loss,
        patience=config.patience,
        progress=lambda step, loss: bar.advance(step / config.steps, loss),
    )
    outcome = {"steps_done": max(0, len(found.trace) - 1), "best_step": found.best_step}
    outcome |= {"losses": found.losses, "trace": found.trace}
    write(save_anchors, file, found.x + positions_TD, provenance | outcome)


def adapt(config: Config, domain: Domain) -> Path:
    """Box 2: for every block, fit the merged block to each expert's outputs on its anchors; put the model together.

    Returns: the folder of the merged checkpoint, which stock libraries open.
    """
    experiment = open_experiment(config, domain)
    domain.check_export(config.model)
    start = merge_start(experiment, domain)
    folder = result_dir(config)
    provenance = fit_provenance(experiment, start)
    if is_finished(folder, provenance):
        remove_blocks(folder)  # which a kill can have left
    else:
        with recorded(config, f"adapt {folder.name}"), UnitBar(f"adapt {folder.name}", len(experiment.blocks)) as bar:
            for index in experiment.blocks:
                with bar.unit(f"block {index}"):
                    adapt_unit(experiment, start, folder, index, provenance, bar)
            assemble(experiment, domain, start, folder, provenance)
    if config.run.score:
        score_run(config, domain)
    return folder


def merge_alone(config: Config, domain: Domain) -> Path:
    """The start by itself: merge in parameter space, write the checkpoint, score it."""
    experiment = open_experiment(config, domain)
    domain.check_export(config.model)
    start = merge_start(experiment, domain)
    if config.run.score:
        score_run(config, domain)
    return start.path


def adapt_unit(
    experiment: Experiment, start: Checkpoint, folder: Path, index: int, provenance: dict, bar: UnitBar
) -> None:
    """Fit one merged block, unless its file is there already."""
    config, file = experiment.config, block_file(folder, index)
    if file.is_file():
        check_provenance(file, read_header(file), provenance)
        return bar.keep()
    theta_0 = experiment.read_block(experiment.base, index)
    inputs, targets = [], []
    for task, expert in experiment.experts.items():
        theta_t = experiment.read_block(expert, index)
        inputs.append(experiment.anchors_of(task, index, theta_0, theta_t))
        with torch.no_grad():
            targets.append(experiment.block(theta_t, inputs[-1]))
    settings = config.adapt.for_start(config.start.method)
    trained = trainable(experiment, start, index, theta_0)
    del theta_0, theta_t  # a block can fill a machine; fitting holds several of its size
    if settings.warm_start == "regmean":
        thetas = (experiment.read_block(expert, index) for expert in experiment.experts.values())
        trained = warmed(experiment.block, trained, zip(thetas, inputs, strict=True))
    merged, trace = fit_block(
        experiment.block,
        trained,
        torch.cat(inputs),
        torch.cat(targets),
        distance=settings.distance,
        lr=settings.lr,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        generator=seeded(config.run.seed, "adapt", index),
        progress=lambda epoch, loss: bar.advance(epoch / settings.epochs, loss),
    )
    write_tensors(file, merged, provenance | {"trace": trace})


def trainable(experiment: Experiment, start: Checkpoint, index: int, theta_0: Params) -> Trainable:
    """What is trained: from the pretrained model its weights (paper Eq. 5); from TA one coefficient for each weight of
    each task vector, from any other start one for each weight of its one merged task vector (paper Eq. 6).
    """
    config = experiment.config
    if config.start.method == PRETRAINED:
        return own_weights(theta_0)
    per_task = config.adapt.for_start("ta").per_task and not config.start.checkpoint
    if config.start.method == "ta" and per_task:
        experts = experiment.experts.values()
        deltas = (subtract(experiment.read_block(expert, index), theta_0) for expert in experts)
        return coefficients(theta_0, deltas, ta_scales(experiment))
    return coefficients(theta_0, [subtract(experiment.read_block(start, index), theta_0)], [1.0])


def ta_scales(experiment: Experiment) -> list[float]:
    """λ of each task in task arithmetic."""
    scale = experiment.hyper("ta")["scale"]
    return list(scale) if isinstance(scale, list | tuple) else [scale] * len(experiment.config.tasks)

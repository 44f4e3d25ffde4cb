"""What each file of a run was made from: recorded with it, and compared before it is used or another is written.

Anchors and adapted blocks have their provenance in the header, a merged model in a provenance.json beside its weights.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Config, as_dict
from common.core.errors import InputError, in_short
from common.core.task_vectors import Params
from common.domain import Domain, first_tests
from common.experiment import Experiment
from common.io.anchor_files import load_anchors, load_published
from common.io.bytes_of import told
from common.io.checkpoints import Checkpoint, check_provenance, flattened, read_header, tensor_digest
from common.io.examples import identity_of
from common.io.hashes import digest, file_hash, identity
from common.io.json_files import interpreted, read_object
from common.io.lineage import warn_of_equals
from common.io.model_files import weight_files
from common.io.written import NAMED, contents_of, written_as
from common.layout import PROVENANCE_FILE, RunLayout
from common.merging.starts import chain_of

WHAT = "provenance of a merged model"


def is_finished(folder: Path, provenance: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is whole; InputError names what differs if it was made from something else, or is not what
    was made."""
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return False
    made, inputs = flattened(read_provenance(folder)), provenance["inputs"]
    named = [field for field in made if field.startswith(tuple(f"inputs.model.{name}" for name in NAMED))]
    unset = dict.fromkeys(named) if "base" in inputs else {}  # settings alone do not say what files hold
    check_provenance(file, made, unset | flattened(provenance))
    require_whole(folder, made)
    return True


def written_weights(folder: Path) -> str:
    """Identifies the weights in a folder by every byte."""
    return identity(told(folder, weight_files(folder)))


def written_files(folder: Path) -> list[str]:
    """Every file of a folder, however deep, by its name there, but hidden ones."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("[!.]*") if file.is_file())


def require_whole(folder: Path, made: Mapping[str, Any]) -> None:
    """InputError if a merged model has lost a file, or its weights are no longer those that its provenance was written
    for; one from before there was a record of them is taken as it is."""
    anew = f"remove {folder} to have it made anew"
    try:
        found = written_weights(folder)
    except InputError as error:  # as of any model; but this one can be had again
        raise InputError(f"{error}; it is a merge of this run: {anew}") from error
    if found != made.get("weights", found):
        raise InputError(
            f"{folder} holds other weights than the run wrote there: what was saved over them is no merge of this run; "
            f"move it away, or {anew}"
        )
    with interpreted(folder / PROVENANCE_FILE, WHAT):
        lost = [name for name in made.get("files", []) if not (folder / name).is_file()]
    if lost:
        raise InputError(f"{folder} has lost {', '.join(in_short(lost))}, which the run wrote there; {anew}")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a merged model says it was made from; InputError if that is damaged."""
    return read_object(folder / PROVENANCE_FILE, WHAT)


def anchor_settings(experiment: Experiment, task: str, index: int) -> dict[str, Any]:
    """What decides the anchors of a unit besides the weights they are made from: settings and seed."""
    config = experiment.config
    settings = as_dict(config.anchors) | {"shape": list(experiment.shape), "scale": experiment.anchor_scale()}
    settings["part"] = experiment.family.part
    for said_by_shape_or_no_matter in ("source", "number", "tokens", "chunk", "snapshots"):
        del settings[said_by_shape_or_no_matter]
    unit = {"task": task, "block": index, "seed": config.run.seed, "precision": config.run.precision}
    return {"anchors": settings, "run": unit, "model": experiment.computed_as | fused_or_not(config)}


def fused_or_not(config: Config) -> dict[str, Any]:
    """What says that the matching loss had q, k and v as one tensor; nothing where it had them as they are stored."""
    return {"fuse_qkv": True} if config.model.fuse_qkv else {}


def anchor_provenance(
    experiment: Experiment, task: str, index: int, theta_0: Params, theta_t: Params
) -> dict[str, Any]:
    """What decides the anchors of a unit: settings, seed, and the weights they are made from."""
    weights = {"base": tensor_digest(experiment.matched(theta_0)), "expert": tensor_digest(experiment.matched(theta_t))}
    if experiment.config.anchors.position_embeddings:
        weights["positions"] = tensor_digest({experiment.family.positions: experiment.positions(task)})
    return anchor_settings(experiment, task, index) | {"weights": weights}


def anchors_of(experiment: Experiment, task: str, index: int, theta_0: Params, theta_t: Params) -> Tensor:
    """The anchors x_ATD of a unit, on the device; InputError if there are none or they are of other weights."""
    file = RunLayout(experiment.config).anchor_file(task, index)
    if not file.is_file():
        raise no_anchors(file, experiment.config)
    if experiment.config.anchors.source:
        axes, width = experiment.family.published_axes, experiment.shape[2]
        return load_published(file, axes, width).to(experiment.device)
    provenance = anchor_provenance(experiment, task, index, theta_0, theta_t)
    return load_anchors(file, provenance, experiment.shape).to(experiment.device)


def require_own_anchors(config: Config) -> None:
    """InputError if the anchors are made elsewhere: there are none to construct."""
    if source := config.anchors.source:
        raise InputError(f"anchors.source has anchors made elsewhere, {source}: none are to be constructed")


def require_anchors(experiment: Experiment) -> None:
    """InputError unless every block has a file of anchors for every task, of these settings where they are made here:
    an adapted model is made from all."""
    layout = RunLayout(experiment.config)
    for task, index in product(experiment.config.tasks, range(experiment.depth)):
        file = layout.anchor_file(task, index)
        if not file.is_file():
            raise no_anchors(file, experiment.config)
        if not experiment.config.anchors.source:
            check_provenance(file, read_header(file), anchor_settings(experiment, task, index))


def no_anchors(file: Path, config: Config) -> InputError:
    """For a unit without a file of anchors."""
    if config.anchors.source:
        return InputError(f"there is no anchor file {file}")
    return InputError(f"there are no anchors at {file}; construct_fda.py with the same config makes them")


def merge_settings(experiment: Experiment) -> dict[str, Any]:
    """What decides the merge of start.method besides the checkpoints."""
    method = experiment.config.start.method
    start = {"method": method, "hyper": experiment.hyper(method)}
    return {"start": start, "inputs": {"model": written_as(experiment.config)}}


def merge_provenance(experiment: Experiment, domain: Domain) -> dict[str, Any]:
    """What decides the merge of start.method: its hyperparameters and checkpoints; of one that uses data also the data
    sets, those that are not of a task's own name, and what stands between them and a model, heads and prompts and
    tokenizers, and "data" follows."""
    config, made = experiment.config, merge_settings(experiment) | {"inputs": inputs_of(experiment)}
    if chain_of(config.start.method).row.data:
        made["data_sets"] = {test: identity_of(config.eval, test) for test in config.tests}
        first = first_tests(config, domain)
        made["tests"] = {task: test if test != task else None for task, test in first.items()}
        of_tests = {test: domain.scorer(config, test) for test in first.values()}
        made["scorers"] = {test: {part: digest(each[part]) for part in each} for test, each in of_tests.items()}
    return made


def inputs_of(experiment: Experiment) -> dict[str, Any]:
    """What identifies the checkpoints that are merged, in the order of the tasks."""
    base, experts = experiment.base.fingerprint(), {t: e.fingerprint() for t, e in experiment.experts.items()}
    warn_of_equals(base, experts, experiment.config.start.mixes_models)
    written = written_as(experiment.config) | contents_of(experiment.config) | experiment.matching.provenance()
    return {"base": base, "experts": [[task, expert] for task, expert in experts.items()], "model": written}


def fit_settings(experiment: Experiment) -> dict[str, Any]:
    """What decides an adapted model besides checkpoints and anchors: settings and seed."""
    config = experiment.config
    settings = as_dict(config.adapt.for_start(config.start.method))
    del settings["by_start"]
    if config.start.method == "ta":  # the same merge can be made here, or given
        settings["per_task"] = config.has_coefficients_per_task
    return {
        "start": {"method": config.start.method},
        "adapt": settings,
        "run": {"seed": config.run.seed},
        "anchors": {"init": config.anchors.init, "part": experiment.family.part},
        "inputs": {"model": written_as(config)},
    } | ({"model": fused} if (fused := fused_or_not(config)) else {})


def fit_provenance(experiment: Experiment, start: Checkpoint) -> dict[str, Any]:
    """What decides an adapted model: settings, seed, start, the experts and every anchor."""
    settings, made = fit_settings(experiment), start.path / PROVENANCE_FILE
    settings["start"]["checkpoint"] = start.fingerprint()
    settings["anchors"]["files"] = anchor_hashes(experiment)
    settings["inputs"] = inputs_of(experiment)
    return settings | data_of(read_provenance(start.path) if made.is_file() else {})


def anchor_hashes(experiment: Experiment) -> str:
    """Identifies the anchors of every block and task, which are there, by every byte."""
    layout, tasks = RunLayout(experiment.config), experiment.config.tasks
    return identity([file_hash(layout.anchor_file(task, index)) for index in range(experiment.depth) for task in tasks])


def block_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an adapted model is made from, what decides its blocks as they are fitted."""
    fit = {name: value for name, value in provenance["adapt"].items() if name not in ("blend", "label")}
    return {**provenance, "adapt": fit}


def data_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Under "data" what inputs of the tasks a model of this provenance was made with, if with any; {} otherwise."""
    return {"data": made["data"]} if "data" in made else {}

"""Where a run keeps its files, and what each says it was made from.

runs/<name>/anchors/<init>/<task>/block_07.safetensors   the anchors of one unit; the header has their provenance
runs/<name>/anchors/<init>/<task>/snapshots_07.safetensors   the same along the optimisation, with anchors.snapshots
runs/<name>/merged/<method>/                             a start: a checkpoint that stock libraries open
runs/<name>/merged/fda-<method>-<init>/                  an adapted model; blocks/ holds its blocks while it is made
.../adaptation.json                                      the losses of each block while it was adapted
runs/<name>/merged/<method>-pretrained-rest/             a start's blocks in the pretrained model, to be scored
.../provenance.json                                      written last: the folder is whole, and made from this
runs/<name>/scores/<test set>.json                       rows of a test set, while others are scored beside it
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Config, as_dict
from common.core.errors import InputError
from common.core.task_vectors import Params
from common.domain import Domain, first_tests
from common.experiment import Experiment, Unit
from common.io.anchor_files import load_anchors, load_published
from common.io.checkpoints import Checkpoint, check_provenance, tensor_digest
from common.io.examples import identity_of
from common.io.hashes import digest, file_hash, identity
from common.io.json_files import read_object
from common.io.lineage import warn_of_equals
from common.io.written import WHERE_SET, contents_of, written_as
from common.merging.starts import chain_of

PROVENANCE_FILE = "provenance.json"
ADAPTATION_FILE = "adaptation.json"  # {"traces": {block: mean loss per anchor in each epoch}}
SAME_REST = "pretrained rest"  # label of a start that is scored with what an adapted model has around its blocks


@dataclass(frozen=True)
class RunLayout:
    """The files and folders of one run."""

    config: Config

    def anchor_file(self, task: str, index: int) -> Path:
        """The anchors of a unit: ours, or those of anchors.source in the released layout."""
        anchors = self.config.anchors
        if anchors.source:
            return anchors.path(task) / f"dual_anchors_layer_{index + 1}.npy"
        return self.anchor_folder / task / f"block_{index:02d}.safetensors"

    def snapshot_file(self, task: str, index: int) -> Path:
        """The anchors of a unit along their optimisation, if anchors.snapshots asked for any."""
        return self.anchor_folder / task / f"snapshots_{index:02d}.safetensors"

    def anchor_files(self, unit: Unit) -> list[Path]:
        """What a unit of construction writes: the anchors of each of its tasks, and what snapshots are asked for."""
        index, tasks = unit
        snapshots = tasks if self.config.anchors.snapshots else []
        return [self.anchor_file(t, index) for t in tasks] + [self.snapshot_file(t, index) for t in snapshots]

    @property
    def anchor_folder(self) -> Path:
        """All anchors that are made from anchors.init."""
        return self.config.run.dir / "anchors" / self.config.anchors.init

    @property
    def merged(self) -> Path:
        """All models that the run makes, a folder each."""
        return self.config.run.dir / "merged"

    @property
    def start(self) -> Path:
        """The merge that adaptation starts from, where start.method is one."""
        return self.merged / self.config.start.method

    @property
    def adapted(self) -> Path:
        """The adapted model."""
        parts = ["fda", self.config.start.method, self.config.anchors.init, self.config.adapt.label]
        return self.merged / "-".join(part for part in parts if part)

    def block_file(self, index: int) -> Path:
        """Where an adapted block waits until all are there."""
        return self.adapted / "blocks" / f"block_{index:02d}.safetensors"

    def part_file(self, number: int) -> Path:
        """Where a part of the start waits until all are there, if it is merged in parts."""
        return self.start / "parts" / f"part_{number:03d}.safetensors"

    def part_files(self, part: tuple[int, Sequence[str]]) -> list[Path]:
        """What a unit of a merge writes, a number and names of tensors."""
        return [self.part_file(part[0])]

    @property
    def scores(self) -> Path:
        """The rows of test sets that are scored side by side, until they are among the results."""
        return self.config.run.dir / "scores"

    def score_file(self, test: str) -> Path:
        """The rows of one test set."""
        return self.scores / f"{test}.json"

    def files_for_block(self, index: int) -> list[Path]:
        """What a unit of adaptation reads of the run: the anchors of every task, and the start that is merged here."""
        ours = not self.config.anchors.source
        anchors = [self.anchor_file(task, index) for task in self.config.tasks if ours]
        merged = sorted(self.start.rglob("*")) if not self.config.start.checkpoint else []
        return anchors + [file for file in merged if file.is_file()]

    def block_files(self, index: int) -> list[Path]:
        """What a unit of adaptation writes."""
        return [self.block_file(index)]


def with_same_rest(start: Path) -> Path:
    """Where a start's blocks in the pretrained model are, beside the start."""
    return start.with_name(f"{start.name}-{SAME_REST.replace(' ', '-')}")


# ---- what it was made from -------------------------------------------------------------------------------------------


def is_finished(folder: Path, provenance: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is whole; InputError names what differs if it was made from something else."""
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return False
    said = provenance.get("inputs", {}).get("model", {})
    unset = {"inputs": {"model": {name: None for name in WHERE_SET if name not in said}}}
    for expected in (provenance, unset):
        check_provenance(file, read_provenance(folder), expected)
    return True


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a merged model says it was made from; InputError if that is damaged."""
    return read_object(folder / PROVENANCE_FILE, "provenance of a merged model")


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
    """InputError unless every block has a file of anchors for every task: an adapted model is made from all."""
    layout = RunLayout(experiment.config)
    for task, index in product(experiment.config.tasks, range(experiment.depth)):
        if not layout.anchor_file(task, index).is_file():
            raise no_anchors(layout.anchor_file(task, index), experiment.config)


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
    sets and what stands between them and a model, heads and prompts and tokenizers, and "data" follows."""
    config, made = experiment.config, merge_settings(experiment) | {"inputs": inputs_of(experiment)}
    if chain_of(config.start.method).row.data:
        made["data_sets"] = {test: identity_of(config.eval, test) for test in config.tests}
        of_tests = {test: domain.scorer(config, test) for test in first_tests(config, domain).values()}
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
    return {
        "start": {"method": config.start.method},
        "adapt": settings,
        "run": {"seed": config.run.seed},
        "anchors": {"init": config.anchors.init, "part": experiment.family.part},
        "inputs": {"model": written_as(config)},
    } | ({"model": fused} if (fused := fused_or_not(config)) else {})


def fit_provenance(experiment: Experiment, start: Checkpoint) -> dict[str, Any]:
    """What decides an adapted model: settings, seed, start, the experts and every anchor."""
    config, layout, settings = experiment.config, RunLayout(experiment.config), fit_settings(experiment)
    made = start.path / PROVENANCE_FILE
    anchors = [file_hash(layout.anchor_file(task, index)) for index in range(experiment.depth) for task in config.tasks]
    settings["start"]["checkpoint"] = start.fingerprint()
    settings["anchors"]["files"] = identity(anchors)
    settings["inputs"] = inputs_of(experiment)
    return settings | data_of(read_provenance(start.path) if made.is_file() else {})


def block_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an adapted model is made from, what decides its blocks as they are fitted."""
    fit = {name: value for name, value in provenance["adapt"].items() if name not in ("blend", "label")}
    return {**provenance, "adapt": fit}


def data_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Under "data" what inputs of the tasks a model of this provenance was made with, if with any; {} otherwise."""
    return {"data": made["data"]} if "data" in made else {}

"""What analyses read of a run: anchors along their optimisation, real inputs of the blocks, models.

Shapes: A anchors, T tokens, D width, R rows: tokens of all anchors or inputs, one below the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.core.errors import InputError
from common.core.task_vectors import Params
from common.domain import Domain, first_tests
from common.evaluation.rows import display
from common.experiment import Experiment
from common.io.anchor_files import load_snapshots
from common.io.checkpoints import Checkpoint, read_header
from common.io.examples import Sample
from common.io.json_files import interpreted
from common.io.unstacked import unstacked
from common.layout import RunLayout
from common.merging.calibration import CalibrationTask, block_params, first_block_inputs, next_block_inputs
from common.pipeline import initial_anchors_of
from common.provenance import anchor_provenance, anchors_of, fit_provenance, is_finished, require_anchors
from common.start import merge_start

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """A run that is open, and what of it is looked at.

    inits: the initialisations of the anchors. runs: {initialisation: the config of the run that has its anchors}, where
    that is another run, as of anchors with another σ.
    """

    domain: Domain
    experiment: Experiment
    blocks: Sequence[int]
    tasks: Sequence[str]
    inits: Sequence[str]
    runs: Mapping[str, Config] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.experiment.config

    @property
    def device(self) -> torch.device:
        return self.experiment.device

    @cached_property
    def names(self) -> list[str]:
        """Names of all tensors that are merged."""
        return self.experiment.base.names(self.experiment.family.scope)

    def title(self, task: str, index: int, init: str = "") -> str:
        """What tells a panel from others: the task, or else the block; and block and initialisation if of several."""
        block = f"block {index}" if len(self.blocks) > 1 or not task else ""
        scheme = display(init) if init and len(self.inits) > 1 else ""
        return ", ".join(filter(None, (task, scheme, block)))

    # ---- anchors -----------------------------------------------------------------------------------------------------

    def at(self, init: str, start: str = "") -> Experiment:
        """The experiment with anchors of an initialisation, and from a start, which is that of the config if unset."""
        config = self.runs.get(init) or replace(self.config, anchors=replace(self.config.anchors, init=init))
        return replace(self.experiment, config=config.at_start(start or config.start.method))

    def thetas(self, task: str, index: int) -> tuple[Params, Params]:
        """θ₀ and θ_t of a block, on the device."""
        experiment = self.experiment
        return experiment.read_block(experiment.base, index), experiment.read_block(experiment.experts[task], index)

    def anchors(self, init: str, task: str, index: int) -> Tensor:
        """The anchors x_ATD of a unit, on the device."""
        return anchors_of(self.at(init), task, index, *self.thetas(task, index))

    def path(self, init: str, task: str, index: int) -> dict[int, Tensor]:
        """{step: x_ATD} along the optimisation: the snapshots of the unit.

        Without snapshots the anchors before the first step, and at the last one those that were kept, the best of all;
        of anchors made elsewhere these alone, at anchors.steps.
        """
        experiment, thetas = self.at(init), self.thetas(task, index)
        layout, kept = RunLayout(experiment.config), anchors_of(experiment, task, index, *thetas)
        if self.config.anchors.source:
            return {self.config.anchors.steps: kept}
        if (file := layout.snapshot_file(task, index)).is_file():
            made = anchor_provenance(experiment, task, index, *thetas)
            return {step: x.to(self.device) for step, x in load_snapshots(file, made, experiment.shape).items()}
        first = initial_anchors_of(experiment, task, index, experiment.matched(thetas[1])) + experiment.positions(task)
        return {0: first, int(self.header(init, task, index)["steps_done"]): kept}

    def header(self, init: str, task: str, index: int) -> dict[str, Any]:
        """How the optimisation of a unit went: trace, best_step, losses, steps_done."""
        file = RunLayout(self.at(init).config).anchor_file(task, index)
        with interpreted(file, "file of anchors"):
            header = read_header(file)
            return {key: header[key] for key in ("trace", "best_step", "losses", "steps_done")}

    # ---- inputs and models -------------------------------------------------------------------------------------------

    def calibration(self, task: str, examples: int) -> CalibrationTask:
        """So many inputs of a task's test set, drawn by run.seed, one in each batch so that none is padded."""
        assert self.domain.calibration_task  # a domain without is refused
        sample = Sample("test", examples, 1, self.config.run.seed)
        return self.domain.calibration_task(
            self.config, first_tests(self.config, self.domain)[task], sample, self.device
        )

    def real_inputs(self, task: str, examples: int) -> Iterator[tuple[int, Tensor]]:
        """(block, x_RD) of what reaches each block looked at in the task's expert, all tokens of so many inputs."""
        calibration, theta = self.calibration(task, examples), self.expert(task)
        flow = first_block_inputs(calibration, theta)
        for index in range(max(self.blocks) + 1):
            if index in self.blocks:
                yield index, torch.cat([inputs.x_ATD.flatten(0, 1) for inputs in flow])
            flow = next_block_inputs(calibration, block_params(theta, calibration.prefixes[index]), flow)

    def read(self, checkpoint: Checkpoint) -> Params:
        """All tensors of a model that are merged, on the device."""
        return self.experiment.read(checkpoint, self.names)

    def base(self) -> Params:
        """θ₀."""
        return self.read(self.experiment.base)

    def expert(self, task: str) -> Params:
        """θ_t."""
        return self.read(self.experiment.experts[task])

    def start(self, method: str) -> Checkpoint:
        """The model that adaptation starts from, merged now if it is not there."""
        experiment = replace(self.experiment, config=self.config.at_start(method))
        self.domain.check_export(self.config.model)
        return merge_start(experiment, self.domain)

    def adapted(self, method: str, init: str) -> Checkpoint:
        """The adapted model; InputError if there is none, or none of this start and these anchors."""
        if found := self.adapted_if_there(method, init):
            return found
        folder = RunLayout(self.at(init, method).config).adapted
        raise InputError(f"there is no adapted model at {folder}; adapt.py with the same config makes it")

    def adapted_if_there(self, method: str, init: str) -> Checkpoint | None:
        """The same, or None if there is none; InputError if one was made from something else."""
        experiment = self.at(init, method)
        folder = RunLayout(experiment.config).adapted
        if not folder.is_dir():
            return None
        require_anchors(experiment)
        if is_finished(folder, fit_provenance(experiment, self.start(method))):
            return unstacked(Checkpoint(folder), experiment.family.pieces)
        return None


def spread(depth: int, shares: Sequence[float]) -> list[int]:
    """The blocks at these shares of the depth, counted as the paper counts layers; all if there is no share."""
    return sorted({max(1, round(share * depth)) - 1 for share in shares}) or list(range(depth))


def plain(value: Any, digits: int = 6) -> Any:
    """Numbers, lists and dictionaries as JSON has them, tensors as lists, every fraction to so many digits."""
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value

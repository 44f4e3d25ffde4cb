"""What a domain module (Vision/domain.py, ...) offers to everything in common/."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.task_vectors import LazyTensor
from common.io.examples import Sample
from common.merging.calibration import CalibrationTask, LabelledTask

FOLDERS = {"vision": "Vision", "nlu": "NLU", "nlg": "NLG"}  # the package of each domain, and its folder


class Scored(NamedTuple):
    """A model on a test set: the value of its metric, the examples scored, and what each came to, as
    common/evaluation/answers.py writes it."""

    value: float
    n: int
    answers: str


class TaskRow(Protocol):
    """A test set, one row of a domain's tasks.yaml; what else it holds is the domain's own affair."""

    @property
    def hub(self) -> str:
        """The data set of the hub that it is read from where it has no folder; empty if there is none."""
        ...

    @property
    def train_split(self) -> str | None:
        """The split that a validation cut is taken from; None where there is no training set."""


class Domain(Protocol):
    """A module that knows one kind of model: its blocks, its test sets, how it is written and scored.

    NAME: the config's domain. TASKS: test sets by name. PERCENT: tables print percent. PARTS: what can be anchored of
    a layer, as anchors.part has it, the default first. SHARDED: a merged model is written as shards, not as one file.
    """

    NAME: str
    PERCENT: bool
    PARTS: tuple[str, ...]
    SHARDED: bool

    @property
    def TASKS(self) -> Mapping[str, TaskRow]: ...

    @property
    def calibration_task(self) -> Callable[[Config, str, Sample, torch.device], CalibrationTask] | None:
        """(config, test set, sample, device) -> inputs of that test set's task, and the model under the head that
        `score` puts on it, for merge methods that use data; None where a domain has no such inputs."""

    @property
    def labelled_task(self) -> Callable[[Config, str, Sample, torch.device], LabelledTask] | None:
        """The same with labels, for analyses that measure or train; None where a domain has none."""

    def family(self, model: Model, part: str = ...) -> BlockFamily:
        """How the base is taken apart into blocks, one of PARTS of each layer; InputError if its architecture cannot be
        told or anchored."""
        ...

    @property
    def unanchored(self) -> Callable[[Model], BlockFamily] | None:
        """How the base is read where nothing of it can be anchored, which is enough to merge it; None where a domain
        reads nothing else than what it anchors."""

    def skeleton(self, model: Model) -> nn.Module: ...
    def check_inputs(self, config: Config) -> None: ...
    def token_shape(self, model: Model, part: str = ...) -> tuple[int, int]: ...
    def metric(self, task: str) -> str: ...
    def check_export(self, model: Model) -> None: ...
    def export(self, model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None: ...
    def scorer(self, config: Config, test: str) -> Any:
        """What decides the answers to a test set besides the model that is asked and the examples, as JSON can say it:
        the test set's row, options, and of files their contents, never where they lie. No model is opened for it."""
        ...

    def score(
        self, config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device
    ) -> Iterator[tuple[str, Scored]]:
        """Several models on a test set, each with its name as soon as it is scored, in their order."""
        ...


def anchored_part(config: Config, domain: Domain) -> str:
    """What is anchored of a layer: anchors.part, or where that is unset what the domain has first."""
    return config.anchors.part or domain.PARTS[0]


def module_of(name: str) -> Domain:
    """The module of a domain, a key of FOLDERS; imported when it is asked for, as its libraries take seconds.

    Python looks for garbage as objects become more; in what libraries make when they are imported there is none, so it
    is not looked through meanwhile, nor later. That spares a tenth of the time.
    """
    module = f"{FOLDERS[name]}.domain"
    if module in sys.modules or not gc.isenabled():
        return cast(Domain, import_module(module))
    gc.disable()
    try:
        return cast(Domain, import_module(module))
    finally:
        gc.freeze()
        gc.enable()


def scored_tests(config: Config, domain: Domain) -> dict[str, str]:
    """Every test set that models are scored on, and the task whose expert it asks: `config.tests` without the names of
    tasks that the domain has no test set for, which are merged all the same.
    """
    return {test: task for test, task in config.tests.items() if test in domain.TASKS or task in config.eval.tests}


def first_tests(config: Config, domain: Domain) -> dict[str, str]:
    """The first test set of every task that is scored."""
    return {task: test for test, task in reversed(scored_tests(config, domain).items())}


def other_models(config: Config) -> dict[str, Path]:
    """Path of every model that is compared with the base, if it is there: the experts, and a start made elsewhere."""
    paths = {task: config.model.path("expert", task) for task in config.tasks}
    if config.start.checkpoint:
        paths["start.checkpoint"] = config.start.path
    return {name: path for name, path in paths.items() if path.exists()}

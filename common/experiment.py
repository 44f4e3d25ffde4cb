"""An experiment with its inputs open and checked: what every stage needs before it begins."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common import anchors
from common.blocks import BlockFamily, moved
from common.checkpoints import Checkpoint, digest
from common.config import Config, Model, as_dict
from common.errors import InputError
from common.lora import open_checkpoint
from common.matching import Block
from common.merging import METHODS, WITH_DATA, check_hyper, hyperparameters
from common.probes import Probe
from common.records import Sample
from common.runtime import prepare
from common.task_vectors import Params, require_same_shapes, subtract
from common.vocabulary import row_counts

PRETRAINED = "pretrained"


class Domain(Protocol):
    """What a domain module (Vision/domain.py, ...) offers."""

    NAME: str
    FAMILIES: Mapping[str, BlockFamily]
    TASKS: Mapping[str, Any]
    PERCENT: bool

    def skeleton(self, model: Model) -> nn.Module: ...
    def token_shape(self, model: Model) -> tuple[int, int]: ...
    def metric(self, task: str) -> str: ...
    def check_export(self, model: Model) -> None: ...
    def export(self, model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None: ...
    def score(
        self, config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device
    ) -> dict[str, tuple[float, int]]: ...


class ProbedDomain(Domain, Protocol):
    """What a domain offers where merge methods can have inputs of its tasks: those of a test set's, and the model under
    the head that `score` puts on it.
    """

    def probe(self, config: Config, task: str, sample: Sample, device: torch.device) -> Probe: ...


@dataclass(frozen=True)
class Experiment:
    """Everything open: headers read, names and shapes compared, no weight in memory yet.

    shape: (A, T, D) of the anchors of one task and block. depth: number of blocks.
    """

    config: Config
    family: BlockFamily
    block: Block
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    shape: tuple[int, int, int]
    depth: int
    device: torch.device

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks to work on."""
        return list(range(self.depth)) if self.config.run.blocks is None else sorted(set(self.config.run.blocks))

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> Params:
        """The named tensors, on the device."""
        return {name: p.to(self.device) for name, p in checkpoint.read(names).items()}

    def read_block(self, checkpoint: Checkpoint, index: int) -> Params:
        """θ of one block, on the device, under the names it has within the block."""
        prefix = self.family.prefix(index)
        return {n.removeprefix(prefix): p for n, p in self.read(checkpoint, checkpoint.names(prefix)).items()}

    def units(self) -> Iterator[tuple[int, Params, dict[str, Params]]]:
        """For every block, for every task: block, θ₀, {task: θ_t}, on the device; with anchors.together for every block
        the θ_t of all tasks. Each weight is read once.
        """
        for index in self.blocks:
            theta_0 = self.read_block(self.base, index)
            thetas = ((task, self.read_block(expert, index)) for task, expert in self.experts.items())
            if self.config.anchors.together != "no":
                yield index, theta_0, dict(thetas)
            else:
                yield from ((index, theta_0, {task: theta_t}) for task, theta_t in thetas)

    def rest_names(self) -> list[str]:
        """Names of the merged tensors that lie outside the anchored blocks."""
        prefixes = tuple(self.family.prefix(index) for index in range(self.depth))
        return [name for name in self.base.names(self.family.scope) if not name.startswith(prefixes)]

    def task_vector(self, task: str, theta_0: Params, theta_t: Params) -> Params:
        """τ of one block without what cannot be matched; InputError if the expert differs from the base nowhere."""
        tau = subtract(theta_t, theta_0)
        if not moved(tau) and not any(
            moved(subtract(self.read_block(self.experts[task], i), self.read_block(self.base, i)))
            for i in range(self.depth)
        ):
            raise InputError(f"the expert of {task}, {self.experts[task].path}, equals the base in every block")
        return self.family.without_null_gradients(tau) if self.config.anchors.skip_null_gradients else tau

    def given_start(self) -> Checkpoint:
        """The checkpoint that start.checkpoint names; InputError if it does not fit the base."""
        start = Checkpoint(Path(self.config.start.checkpoint).expanduser(), self.family.names)
        start.resize(row_counts(self.family.vocabulary, self.base, [start], self.config.model.vocabulary))
        scope = self.family.scope
        require_same_shapes(start.shapes_under(scope), self.base.shapes_under(scope), str(start.path))
        return start

    def hyper(self, method: str) -> dict[str, Any]:
        """All hyperparameters of a merge method: its defaults, and over them the config's."""
        defaults = {name: p.default for name, p in hyperparameters(method).items()}
        return defaults | self.config.start.hyper.get(method, {})

    def anchor_file(self, task: str, index: int) -> Path:
        """Where the anchors of a unit are: ours, or those of anchors.source in the released layout."""
        if self.config.anchors.source:
            return self.config.anchors.path(task) / f"dual_anchors_layer_{index + 1}.npy"
        return self.config.run.dir / "anchors" / self.config.anchors.init / task / f"block_{index:02d}.safetensors"

    def positions(self, task: str) -> Tensor:
        """What is added to the anchors of a task before a block sees them, on the device: 0, or with
        anchors.position_embeddings rows 0 to T - 1 of the expert's position embeddings, (T, D).

        The anchors are optimised without them and stored with them, as in the released files: adaptation adds nothing.
        """
        if not self.config.anchors.position_embeddings:
            return torch.zeros((), device=self.device)
        return self.read(self.experts[task], [self.family.positions])[self.family.positions][: self.shape[1]]

    def anchor_scale(self) -> float:
        """Factor on the initial anchors."""
        scale = self.config.anchors.scale
        return anchors.SCALES[self.config.anchors.init] if scale is None else scale

    def anchor_provenance(self, task: str, index: int, theta_0: Params, theta_t: Params) -> dict[str, Any]:
        """What decides the anchors of a unit: settings, seed, and the weights they are made from."""
        settings = as_dict(self.config.anchors) | {"shape": list(self.shape), "scale": self.anchor_scale()}
        for said_by_shape_or_no_matter in ("source", "number", "tokens", "chunk"):
            del settings[said_by_shape_or_no_matter]
        run = self.config.run
        unit = {"task": task, "block": index, "seed": run.seed, "precision": run.precision}
        weights = {"base": digest(theta_0), "expert": digest(theta_t)}
        if self.config.anchors.position_embeddings:
            weights["positions"] = digest({self.family.positions: self.positions(task)})
        return {"anchors": settings, "run": unit, "weights": weights}

    def anchors_of(self, task: str, index: int, theta_0: Params, theta_t: Params) -> torch.Tensor:
        """The anchors x_ATD of a unit, on the device; InputError if there are none or they are of other weights."""
        file = self.anchor_file(task, index)
        if self.config.anchors.source:
            return anchors.load_published(file, self.family.published_axes, self.shape[2]).to(self.device)
        if not file.is_file():
            raise InputError(f"there are no anchors at {file}; construct_fda.py with the same config makes them")
        return anchors.load_anchors(file, self.anchor_provenance(task, index, theta_0, theta_t)).to(self.device)


def open_experiment(config: Config, domain: Domain) -> Experiment:
    """Open and compare all inputs, headers only. Raises InputError at the first thing that cannot work."""
    family = check_choices(config, domain)
    modules = family.modules(domain.skeleton(config.model))
    for index in config.run.blocks or []:
        if not 0 <= index < len(modules):
            raise InputError(f"run.blocks names block {index}; the model has blocks 0 to {len(modules) - 1}")
    base = Checkpoint(config.model.path("base"), family.names)
    for index, module in enumerate(modules):
        prefix = family.prefix(index)
        expected = {prefix + name: p.shape for name, p in module.named_parameters()}
        require_same_shapes(base.shapes_under(prefix), expected, str(base.path))
    experts = {
        task: open_checkpoint(config.model.path("expert", task), base.path, family.names) for task in config.tasks
    }
    rows = row_counts(family.vocabulary, base, experts.values(), config.model.vocabulary)
    for checkpoint in (base, *experts.values()):
        checkpoint.resize(rows)
    for expert in experts.values():
        require_same_type(base.path, expert.path)
        require_same_shapes(expert.shapes_under(family.scope), base.shapes_under(family.scope), str(expert.path))
    tokens, width = domain.token_shape(config.model)
    if config.anchors.position_embeddings:
        check_positions(family, base, config.anchors.tokens or tokens, width)
    return Experiment(
        config=config,
        family=family,
        block=family.pure(modules[0]),
        base=base,
        experts=experts,
        shape=(config.anchors.number, config.anchors.tokens or tokens, width),
        depth=len(modules),
        device=prepare(config.run.device),
    )


def require_same_type(base: Path, expert: Path) -> None:
    """InputError if the config files beside the weights name two architectures: Llama and Mistral have equal shapes."""
    types = [model_type(base), model_type(expert)]
    if None not in types and types[0] != types[1]:
        raise InputError(f"{expert}/config.json has model type {types[1]!r}, that of {base} has {types[0]!r}")


def model_type(path: Path) -> str | None:
    """The architecture that the config.json beside a checkpoint's weights names, if there is one that does."""
    file = path / "config.json"
    try:
        return json.loads(file.read_text()).get("model_type") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} is no config file, JSON with a model_type ({error})") from error


def check_positions(family: BlockFamily, base: Checkpoint, tokens: int, width: int) -> None:
    """InputError if position embeddings cannot be added to anchors of T tokens and width D."""
    shape = base.shapes.get(family.positions)
    if shape is None:
        raise InputError("anchors.position_embeddings is on, but the models have none")
    if shape[0] < tokens or shape[1] != width:
        raise InputError(f"anchors.position_embeddings: {family.positions} is {shape}, anchors are {(tokens, width)}")


def check_data(config: Config, domain: Domain, method: str) -> None:
    """InputError if a merge method that uses inputs of the tasks cannot have any."""
    if not hasattr(domain, "probe"):
        raise InputError(f"{method} needs data of the tasks; {domain.NAME} has none for it")
    for task in config.tasks:
        if task not in config.tests.values():
            raise InputError(f"{method} needs data of every task, but eval.tests has no test set of {task}")


def check_choices(config: Config, domain: Domain) -> BlockFamily:
    """The family of the config; InputError naming the choices where a task, family or method is none of them."""
    if config.domain != domain.NAME:
        raise InputError(f"this is the command of {domain.NAME}, the config is of domain {config.domain}")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError("tasks must name at least one task, and none twice")
    for test in config.tests:
        if test not in domain.TASKS:
            raise InputError(f"unknown task {test!r}; choose from {', '.join(domain.TASKS)}")
        if config.eval.split != "test" and not hasattr(domain.TASKS[test], "train_split"):
            raise InputError(f"eval.split is {config.eval.split}, but {test} has no training set to cut from")
    named = [test for task in config.tasks for test in config.eval.tests.get(task, [task])]
    if len(named) > len(config.tests):
        raise InputError(f"eval.tests names one test set for two tasks: {', '.join(named)}")
    for task in config.eval.tests:
        if task not in config.tasks:
            raise InputError(f"eval.tests names the task {task!r}; tasks are {', '.join(config.tasks)}")
    family = config.model.family_of(domain.FAMILIES)
    if family not in domain.FAMILIES:
        raise InputError(f"unknown model.family {family!r}; choose from {', '.join(domain.FAMILIES)}")
    for name in ("vocabulary", "dtype", "tokenizers"):
        if not domain.FAMILIES[family].vocabulary and getattr(config.model, name) != getattr(Model(), name):
            raise InputError(f"model.{name} is for language models, not for {config.domain}")
    if config.start.checkpoint and config.start.method == PRETRAINED:
        raise InputError("start.checkpoint needs start.method to name it: the method that it was merged by, say")
    for method in sorted(
        {config.start.method, *config.compare.starts, *config.start.hyper, *config.adapt.by_start} - {PRETRAINED}
    ):
        if method == config.start.method and config.start.checkpoint:
            continue
        if method not in METHODS | WITH_DATA:
            raise InputError(f"unknown start {method!r}; choose from {', '.join((PRETRAINED, *METHODS, *WITH_DATA))}")
        if method in WITH_DATA:
            check_data(config, domain, method)
        check_hyper(method, config.start.hyper.get(method, {}), len(config.tasks))
    if config.anchors.together != "no" and config.anchors.chunk:
        raise InputError("anchors.together has all anchors of all tasks in memory; anchors.chunk cannot be set with it")
    positive = {
        "anchors": ("number", "chunk", "tokens", "lr", "stop_loss", "patience"),
        "adapt": ("lr", "epochs", "batch_size"),
        "eval": ("batch_size",),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value <= 0 and not (name == "epochs" and config.adapt.warm_start != "none"):
                raise InputError(f"{section}.{name} is {value}; it must be above zero")
    if config.adapt.for_start(config.start.method).speedup < 1:
        raise InputError("adapt.speedup divides the epochs; it must be at least 1")
    return domain.FAMILIES[family]

"""An experiment with its inputs open and checked: what every stage needs before it begins."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.core.blocks import Block, BlockFamily, BlockModule, nonzero_tensors
from common.core.errors import InputError
from common.core.task_vectors import Params, require_same_shapes, subtract
from common.domain import Domain
from common.fda.anchors import SCALES
from common.io.adapters import is_adapter, open_adapter
from common.io.checkpoints import Checkpoint, remove_leftovers
from common.io.heads import leave_to_heads, open_experts, open_like
from common.io.matched import Matching
from common.io.unstacked import unstacked
from common.io.vocabulary import match_vocabularies
from common.merging.registry import hyperparameters
from common.run.device import prepare
from common.run.run_log import NOTES
from common.validation import check_choices, check_positions, check_tokenizers


@dataclass(frozen=True)
class Experiment:
    """Everything open: headers read, names and shapes compared, no weight in memory yet.

    functions: each block as a pure function. prefixes: how the names of each block's tensors begin. shape: (A, T, D) of
    the anchors of one task and block. matching: which row of an expert's embedding is which of the merged model's.
    """

    config: Config
    family: BlockFamily
    functions: tuple[Block, ...]
    prefixes: tuple[str, ...]
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    shape: tuple[int, int, int]
    device: torch.device
    matching: Matching

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.prefixes)

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks to work on."""
        return list(range(self.depth)) if self.config.run.blocks is None else sorted(set(self.config.run.blocks))

    @property
    def largest_product(self) -> int:
        """Multiplications of the largest matrix product of a block, over a task's anchors or a batch of adaptation."""
        anchors, tokens, _ = self.shape
        rows = tokens * max(anchors, self.config.adapt.for_start(self.config.start.method).batch_size)
        kinds = dict(zip(self.functions, self.prefixes, strict=True)).values()  # one of each: blocks can be thousands
        shapes = (shape for prefix in kinds for shape in self.base.shapes_under(prefix).values())
        return rows * max(math.prod(shape) for shape in shapes if len(shape) == 2)

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> Params:
        """The named tensors, on the device."""
        return {name: p.to(self.device) for name, p in checkpoint.read(names).items()}

    def read_block(self, checkpoint: Checkpoint, index: int) -> Params:
        """θ of one block, on the device, under the names it has within the block."""
        prefix = self.prefixes[index]
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
        return [name for name in self.base.names(self.family.scope) if not name.startswith(self.prefixes)]

    def task_vector(self, task: str, theta_0: Params, theta_t: Params) -> Params:
        """τ of one block without what cannot be matched; InputError if the expert differs from the base nowhere."""
        tau = subtract(theta_t, theta_0)
        if not nonzero_tensors(tau) and not any(
            nonzero_tensors(subtract(self.read_block(self.experts[task], i), self.read_block(self.base, i)))
            for i in range(self.depth)
        ):
            raise InputError(
                f"the expert of {task}, {self.experts[task].path}, equals the base in every "
                "anchored block; it can still be merged: scripts/merge.py"
            )
        return self.family.without_null_gradients(tau) if self.config.anchors.skip_null_gradients else tau

    def require_moved_blocks(self) -> None:
        """InputError on an expert whose headers tell that it differs from the base in no anchored block."""
        for task, expert in self.experts.items():
            if not any(map(expert.touches, self.prefixes)):
                where = f"none of {self.prefixes[0]} to {self.prefixes[-1]}"
                hint = "so no anchors can be made for it; scripts/merge.py merges it all the same"
                raise InputError(f"the expert of {task}, {expert.path}, changes {where}, {hint}")

    def given_start(self) -> Checkpoint:
        """The checkpoint that start.checkpoint names; InputError if it does not fit the base."""
        path = self.config.start.path
        start = unstacked(open_like(self.base, path, self.family.names, self.family.vocabulary), self.family.pieces)
        if self.config.model.vocabulary != "refuse":
            names = [name for name in self.family.vocabulary if name in self.base.shapes]
            start.resize({name: self.base.shapes[name][0] for name in names})
        scope = self.family.scope
        require_same_shapes(start.shapes_under(scope), self.base.shapes_under(scope), str(start.path))
        return start

    def hyper(self, method: str) -> dict[str, Any]:
        """All hyperparameters of a merge method: its defaults, and over them the config's."""
        defaults = {name: p.default for name, p in hyperparameters(method).items()}
        return defaults | self.config.start.hyper.get(method, {})

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
        return SCALES[self.config.anchors.init] if scale is None else scale


Checking = Callable[[str], AbstractContextManager[None]]
"""checking(input): a context for one check of that input. In a dry run it notes the InputError, and others follow."""


def open_experiment(config: Config, domain: Domain) -> Experiment:
    """Open and compare all inputs, headers only. Raises InputError at the first thing that cannot work."""
    check_choices(config, domain)
    remove_leftovers(config.run.dir / NOTES)
    experiment = open_inputs(config, domain, lambda _: nullcontext())
    assert experiment  # what is missing has been refused
    return replace(experiment, device=prepare(config.run.device))


@contextmanager
def opening(checking: Checking, what: str, path: Path) -> Iterator[None]:
    """A check of one input; on an error that is no InputError there is a note of it, for the command to say."""
    with checking(what):
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            error.add_note(f"opening {what}, {path}")
            raise


def open_inputs(config: Config, domain: Domain, checking: Checking) -> Experiment | None:
    """Open and compare base and experts, headers only, and choose no device yet.

    Returns: None where a check was refused without which there is no experiment, if `checking` let it go on.
    """
    path, base, family = config.model.path("base"), None, BlockFamily(blocks="")
    modules, tokens, width = [], 0, 0
    with opening(checking, "base", path):
        base = Checkpoint(path)
    if base:
        with checking("configs"):
            domain.check_inputs(config)
    if base or config.model.arch:
        with opening(checking, "model", path):
            family = domain.family(config.model)
            modules = family.modules(domain.skeleton(config.model))
            tokens, width = domain.token_shape(config.model)
    if base and modules:
        with opening(checking, "base", path):
            base = Checkpoint(path, family.names)
    with checking("run.blocks"):
        check_indices(config.run.blocks or [], len(modules))
    if base:
        with checking("base"):
            check_blocks(unstacked(base, family.pieces), modules)
    experts = open_all_experts(config, domain, family, base, checking)
    if not base:
        return None
    base, experts, matching = compare_experts(config, family, base, experts, checking)
    if not modules or len(experts) < len(config.tasks):
        return None
    shape = (config.anchors.number, config.anchors.tokens or tokens, width)
    if config.anchors.position_embeddings:
        with checking("base"):
            check_positions(family, base, *shape[1:])
    functions, prefixes = family.functions(modules), tuple(prefix for prefix, _ in modules)
    return Experiment(config, family, functions, prefixes, base, experts, shape, torch.device("cpu"), matching)


def check_indices(indices: Iterable[int], depth: int) -> None:
    """InputError if run.blocks names a block that the model does not have; a depth of 0 is not known."""
    for index in indices:
        if depth and not 0 <= index < depth:
            raise InputError(f"run.blocks names block {index}; the model has blocks 0 to {depth - 1}")


def check_blocks(base: Checkpoint, modules: Iterable[BlockModule]) -> None:
    """InputError if the base lacks a tensor of a block, or has it in another shape than the architecture."""
    for prefix, module in modules:
        expected = {prefix + name: p.shape for name, p in module.named_parameters()}
        require_same_shapes(base.shapes_under(prefix), expected, str(base.path))


def open_all_experts(
    config: Config, domain: Domain, family: BlockFamily, base: Checkpoint | None, checking: Checking
) -> dict[str, Checkpoint]:
    """The experts that are there, opened together, for all models get the same heads; none without a base."""
    paths: dict[str, Path] = {}
    for task in config.tasks:
        path = config.model.path("expert", task)
        with opening(checking, f"expert {task}", path):
            check_is_there(path, task, domain)
            paths[task] = path
    if not base:
        return {}
    how = (family.names, family.vocabulary, config.model.arch)
    with checking("experts"):
        try:
            return open_experts(base, paths, *how)
        except InputError:
            for task, path in paths.items():  # whose fault it is
                with opening(checking, f"expert {task}", path):
                    open_experts(Checkpoint(base.path, family.names), {task: path}, *how)
            raise
    return {}


def check_is_there(path: Path, task: str, domain: Domain) -> None:
    """InputError if there is no expert at a path: it names the path, and the test sets that may have been meant."""
    try:
        open_adapter(path) if is_adapter(path) else Checkpoint(path)
    except InputError as error:
        meant = get_close_matches(task, domain.TASKS, cutoff=0.7)
        if path.exists() or task in domain.TASKS or not meant:
            raise
        raise InputError(f"{error}; is the task {task!r} misspelt? close to it: {', '.join(meant)}") from error


def compare_experts(
    config: Config, family: BlockFamily, base: Checkpoint, experts: Mapping[str, Checkpoint], checking: Checking
) -> tuple[Checkpoint, Mapping[str, Checkpoint], Matching]:
    """Refuse an expert that is not of the base's architecture, names and shapes.

    Returns: base and experts with the same rows for the same tokens, and how these were matched.
    """
    leave_to_heads(family.before_head, base, experts.values())
    base = unstacked(base, family.pieces)
    experts = {task: unstacked(expert, family.pieces) for task, expert in experts.items()}
    matching = Matching(0)
    with checking("model.vocabulary"):
        base, experts, matching = match_vocabularies(family.vocabulary, base, experts, config.model.vocabulary)
        check_tokenizers(config, matching)
    for task, expert in experts.items():
        with opening(checking, f"expert {task}", expert.path):
            require_same_shapes(expert.shapes_under(family.scope), base.shapes_under(family.scope), str(expert.path))
    return base, experts, matching

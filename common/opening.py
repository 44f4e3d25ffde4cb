"""Opening an experiment: its inputs read by their headers, compared and checked, before any weight is in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from tqdm import tqdm

from common.config import Config
from common.core.blocks import NOTHING, BlockFamily, BlockModule
from common.core.errors import InputError
from common.core.notices import warn
from common.core.task_vectors import require_same_shapes
from common.domain import FOLDERS, Domain, anchored_part, module_of
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint, remove_leftovers
from common.io.heads import leave_to_heads, open_experts
from common.io.lineage import warn_of_equals
from common.io.matched import Matching
from common.io.sentence_modules import compare_modules
from common.io.unread import settle_unread, with_copies
from common.io.unstacked import unstacked
from common.io.vocabulary import match_vocabularies
from common.merging.registry import METHODS
from common.run.device import WORTH_THREADS, prepare, threads_for
from common.run.engine import Demand, Files, Memory, place_for, value_of
from common.run.progress import UnitBar, Units
from common.run.run_log import NOTES
from common.validation import (
    check_choices,
    check_fused,
    check_is_there,
    check_positions,
    check_test_data,
    check_tokenizers,
)

_OPEN: dict[str, Experiment] = {}  # what a worker has open
Checking = Callable[[str], AbstractContextManager[None]]
"""checking(input): a context for one check of that input. In a dry run it notes the InputError, and others follow."""


def open_experiment(config: Config, domain: Domain, anchored: bool = True) -> Experiment:
    """Open and compare all inputs, headers only. Raises InputError at the first thing that cannot work.

    anchored: False where nothing is done but merging in weight space, so that nothing need be anchorable.
    """
    check_choices(config, domain)
    remove_leftovers(config.run.dir / NOTES)
    experiment = open_inputs(config, domain, lambda _: nullcontext(), anchored)
    assert experiment  # what is missing has been refused
    return replace(experiment, device=prepare(config.run.device))


def open_stage(config: Config, domain: Domain, anchored: bool = True) -> Experiment:
    """As `open_experiment`, for a stage of a run: what its models will be scored on is there too."""
    experiment = open_experiment(config, domain, anchored)
    check_test_data(config, domain)
    return experiment


def carry_out(
    each: Callable[..., None],
    experiment: Experiment,
    units: Sequence[Any],
    bar: UnitBar,
    *arguments: Any,
    reads: Callable[[Any], Sequence[Path]] = lambda unit: (),
    writes: Callable[[Any], Sequence[Path]],
    seconds: float,
    memory: Callable[[], Memory],
    done: Callable[[Any], None] = lambda unit: None,
) -> None:
    """each(experiment, units, bar, *arguments): here, or a unit at a time wherever run.engine lets units be worked on.

    Args:
        each: A function of a module. It writes the files of each unit, and tells the bar what it does.
        reads, writes: The files of a unit in the run's folder. Where all that it writes are there it is kept.
        seconds, memory: What a unit takes on one core, roughly; and the forecast of the dry run.
        done: Called with each unit that somebody else has done.
    """
    config, todo = experiment.config, [unit for unit in units if not all(file.is_file() for file in writes(unit))]
    demand = Demand(len(todo), seconds, experiment.largest_product < WORTH_THREADS, memory)
    place = place_for(config.run, demand, libraries_of(config))
    if place is None:
        with threads_for(experiment.largest_product):
            return each(experiment, units, bar, *arguments)
    tqdm.write(f"{bar.stage}: {place.said}")
    there = replace(config, run=replace(config.run, root=place.root or config.run.root))
    work = partial(unit_of_worker, each, there, bar.stage, uuid4().hex, arguments)
    files = Files(Path(config.run.root).expanduser(), reads, writes)
    with closing(place.outcomes(work, units, files)) as outcomes:
        for unit, outcome in outcomes:
            bar.add(value_of(outcome), outcome.who, outcome.took)
            done(unit)


def libraries_of(config: Config) -> tuple[str, ...]:
    """The modules that a worker needs, and which bring all others."""
    return "common.pipeline", f"{FOLDERS[config.domain]}.domain"


def unit_of_worker(
    each: Callable[..., None], config: Config, stage: str, call: str, arguments: Any, unit: Any
) -> Units:
    """One unit, in a process that has opened the experiment for this call of `carry_out` and keeps it open."""
    if call not in _OPEN:
        _OPEN.clear()
        _OPEN[call] = open_experiment(config, module_of(config.domain), anchored=False)  # else it was refused before
    experiment, units = _OPEN[call], Units(stage=stage)
    with threads_for(experiment.largest_product):
        each(experiment, [unit], units, *arguments)
    return units


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


def family_of(config: Config, domain: Domain, part: str, anchored: bool) -> BlockFamily:
    """How the base is taken apart; where nothing of it can be anchored, and nothing need be, how it is read.

    Raises: InputError if it cannot be; if stacks of matrices are not taken apart, and start.method is of matrices.
    """
    try:
        return domain.family(config.model, part)
    except InputError as error:
        if anchored or not domain.unanchored:
            raise
        found, method = domain.unanchored(config.model), config.start.method
        stacks = (n for n, p in domain.skeleton(config.model).named_parameters() if p.ndim > 2 and 1 not in p.shape)
        name = next(stacks, "")
        by_weight = [row for row, of in METHODS.items() if of.by_weight]
        if name and method not in by_weight:
            raise InputError(
                f"{error}; {name} is a stack of matrices that is merged as it is, which {method} is not for: choose "
                f"start.method from {', '.join(by_weight)}, which work on each weight"
            ) from error
        return replace(found, part=NOTHING)


def open_inputs(config: Config, domain: Domain, checking: Checking, anchored: bool = True) -> Experiment | None:
    """Open and compare base and experts, headers only, and choose no device yet; `anchored` as `open_experiment`.

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
            part = anchored_part(config, domain)
            family = family_of(config, domain, part, anchored)
            modules = family.modules(domain.skeleton(config.model))
            tokens, width = domain.token_shape(config.model, part)
    if base and modules:
        with opening(checking, "base", path):
            base = Checkpoint(path, family.names)
    with checking("run.blocks"):
        check_indices(config.run.blocks or [], len(modules))
    with checking("model.fuse_qkv"):
        check_fused(config, modules)
    if base:
        with checking("base"):
            if family.part == NOTHING:
                require_stored(base, family, domain.skeleton(config.model))
            else:
                check_blocks(unstacked(base, family.pieces), modules)
    experts = open_all_experts(config, domain, family, base, checking)
    if not base or not modules:  # of an unknown architecture no name of a tensor is known to be another's
        return None
    base, experts, matching = compare_experts(config, family, base, experts, checking)
    if len(experts) < len(config.tasks):
        return None
    shape = config.anchors.shape(tokens, width)
    if config.anchors.position_embeddings:
        with checking("base"):
            check_positions(family, base, *shape[1:])
    places = {task: expert.path.resolve() for task, expert in experts.items()}
    warn_of_equals(base.path.resolve(), places, config.start.mixes_models)
    with checking("modules of sentence-transformers"):
        compare_modules(base.path, {task: e.path for task, e in experts.items()}, bool(family.vocabulary))
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
        weights = {name: t for name, t in module.state_dict().items() if t.is_floating_point()}  # stored buffers too
        expected = {prefix + name: t.shape for name, t in weights.items()}
        require_same_shapes(base.shapes_under(prefix), expected, str(base.path))


def require_stored(base: Checkpoint, family: BlockFamily, skeleton: nn.Module) -> None:
    """InputError if the base lacks a tensor of a layer, or has it in another shape, as transformers stores them."""
    expected = {n: shape for n, shape in family.stored(skeleton).items() if n.startswith(family.prefixes)}
    require_same_shapes({n: s for n, s in base.shapes.items() if n in expected}, expected, str(base.path))


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
    how = (family.names, family.vocabulary, config.model.arch, family.turned)
    with checking("experts"):
        try:
            return open_experts(base, paths, *how)
        except InputError:
            for task, path in paths.items():  # whose fault it is
                with opening(checking, f"expert {task}", path):
                    open_experts(Checkpoint(base.path, family.names), {task: path}, *how)
            raise
    return {}


def compare_experts(
    config: Config, family: BlockFamily, base: Checkpoint, experts: Mapping[str, Checkpoint], checking: Checking
) -> tuple[Checkpoint, Mapping[str, Checkpoint], Matching]:
    """Refuse an expert that is not of the base's architecture, names and shapes.

    Returns: base and experts with the same rows for the same tokens, and how these were matched.
    """
    leave_to_heads(family.before_head, base, experts.values())
    settle_unread(base, experts.values(), family.unread)
    by_token = with_copies(family.by_token, base, family.unread)
    lent = {task: tuple(family.lent(expert.shapes)) for task, expert in experts.items()}
    base = unstacked(base, family.pieces)
    experts = {task: unstacked(expert, family.pieces) for task, expert in experts.items()}
    for task, names in lent.items():
        for name in names:
            experts[task].borrow(name, base)
            warn(f"the expert of {task}, {experts[task].path}, has no {name}; it is taken to be the base's")
    matching = Matching(0)
    with checking("model.vocabulary"):
        policy = config.model.vocabulary if config.domain == "nlg" else ""  # check_choices: no other has the choice
        base, experts, matching = match_vocabularies(by_token, base, experts, policy)
        check_tokenizers(config, matching)
    for task, expert in experts.items():
        with opening(checking, f"expert {task}", expert.path):
            found, expected = (model.shapes_under(family.scope) for model in (expert, base))
            try:
                require_same_shapes(found, expected, str(expert.path))
            except InputError as error:
                raise InputError(f"{error}; an expert must be a fine-tuned copy of the base, {base.path}") from error
    return base, experts, matching

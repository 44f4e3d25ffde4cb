"""The start of a run: the checkpoint that a merge method makes of the experts, tensor by tensor."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from common.assembly import finish, remove_pieces, require_free
from common.config import PRETRAINED, Config
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params, add, lazy_task_vector, subtract
from common.domain import Domain, first_tests
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint, check_provenance, read_header, write_tensors
from common.io.examples import Sample
from common.io.headers import tensor_rows
from common.io.locks import locked
from common.io.tensors import WHOLE, read_tensor
from common.io.unstacked import unstacked
from common.layout import RunLayout
from common.merging.starts import by_part, chain_of, merge, survey
from common.opening import carry_out
from common.provenance import is_finished, merge_provenance
from common.run.device import threads_for
from common.run.engine import Memory, asks_for_workers
from common.run.progress import UnitBar, Units, counted
from common.run.run_log import record_stage

Part = tuple[int, Sequence[str]]
"""A part of a merge: its number, and the names of its tensors."""
KEPT = 2**20  # weights: of so small a tensor all task vectors are read once and kept


def require_merge(config: Config) -> None:
    """InputError if the config names no merge: there is nothing to make of the experts by itself."""
    if config.start.checkpoint:
        raise InputError(f"start.checkpoint has the start already, {config.start.path}: there is nothing to merge")
    if config.start.method == PRETRAINED:
        raise InputError(f"start.method is {PRETRAINED}, which merges nothing; name a method, as in --start.method ta")


def merge_start(experiment: Experiment, domain: Domain) -> Checkpoint:
    """The checkpoint of the start: the base itself, or what the merge method makes, unless it is on disk already."""
    method = experiment.config.start.method
    if method == PRETRAINED or experiment.config.start.checkpoint:
        return opened_start(experiment)
    folder, provenance = RunLayout(experiment.config).start, merge_provenance(experiment, domain)
    require_free(folder)
    if not is_finished(folder, provenance):
        if chain_of(method).row.data or not asks_for_workers(experiment.config.run):
            with locked(folder):
                merge_whole(experiment, domain, method, provenance)
        else:
            merge_in_parts(experiment, domain, method, provenance)
    remove_pieces(folder)  # which a merge that was killed can have left, too
    return opened_start(experiment)


def merge_whole(experiment: Experiment, domain: Domain, method: str, provenance: dict[str, Any]) -> None:
    """A merge by this process alone, unless another made it meanwhile."""
    folder = RunLayout(experiment.config).start
    if is_finished(folder, provenance):
        return
    with record_stage(experiment.config, f"merge {method}"), threads_for(experiment.largest_product):
        if chain_of(method).row.data:
            tensors, provenance["data"] = merged_with_data(experiment, domain, method)
        else:
            tensors = merged_tensors(experiment, method)
        finish(experiment, domain, tensors, folder, provenance)


def merge_in_parts(experiment: Experiment, domain: Domain, method: str, provenance: dict[str, Any]) -> None:
    """A merge whose tensors are made part by part, each where run.engine lets it be made, and then put together."""
    layout, parts = RunLayout(experiment.config), list(enumerate(merge_groups(experiment)))
    largest = max(math.prod(shape) for shape in experiment.base.shapes.values())
    held = 4.0 * largest * (len(experiment.experts) + 6)  # θ₀, each τ if the method keeps them, what becomes of them
    bar = UnitBar(f"merge {method}", len(parts), "parts")
    with record_stage(experiment.config, bar.stage, bar), bar:
        forecast = {"seconds": 0.0, "memory": lambda: Memory(held, held, held)}
        with threads_for(experiment.largest_product):
            known = (provenance, survey_of(experiment, method))
        carry_out(merge_each, experiment, parts, bar, *known, writes=layout.part_files, **forecast)
        with locked(layout.start):
            if not is_finished(layout.start, provenance):  # by another process, which removed the parts
                stored = {row.stored: row for number, _ in parts for row in tensor_rows(layout.part_file(number))}
                made = made_by(experiment, lambda name, rows: read_tensor(stored[name], rows))
                finish(experiment, domain, made, layout.start, provenance)


def merge_groups(experiment: Experiment) -> list[list[str]]:
    """Names of the merged tensors in parts: those of a block, and every other by itself."""
    blocks, others = {prefix: [] for prefix in experiment.prefixes}, []
    for name in experiment.base.names(experiment.family.scope):
        begun = (name[: dot.end()] for dot in re.finditer(r"\.", name))
        prefix = next(filter(blocks.__contains__, begun), None)
        others.append([name]) if prefix is None else blocks[prefix].append(name)
    return [*blocks.values(), *others]


def merge_each(
    experiment: Experiment, parts: Iterable[Part], bar: Units, provenance: dict[str, Any], surveyed: Any
) -> None:
    """Merge and store some parts, unless their files are there already."""
    method = experiment.config.start.method
    for number, names in parts:
        file = RunLayout(experiment.config).part_file(number)
        with bar.unit(f"{names[0]} and {len(names) - 1} more"):
            if file.is_file():
                check_provenance(file, read_header(file), provenance)
                bar.keep()
            else:
                tensors = {name: merged_tensor(experiment, method, name, surveyed) for name in names}
                write_tensors(file, tensors, provenance)


def opened_start(experiment: Experiment) -> Checkpoint:
    """The checkpoint of the start, which is there."""
    if experiment.config.start.method == PRETRAINED:
        return experiment.base
    if experiment.config.start.checkpoint:
        return experiment.given_start()
    return unstacked(Checkpoint(RunLayout(experiment.config).start), experiment.family.pieces)


def merged_with_data(
    experiment: Experiment, domain: Domain, method: str
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Every tensor of the merged model under a method that uses data, and how many inputs of which split it used.

    All tensors of the base, of every expert and of the merged model are in memory at once.
    """
    config, chain, hyper = experiment.config, chain_of(method), experiment.hyper(method)
    row, own = chain.row, by_part(chain, hyper)[chain.method]
    assert row.data and domain.calibration_task  # check_choices refuses a domain that has none
    sample = Sample(row.data.split, own["examples"], row.data.batch, own.get("seed", 0))
    tests = map(first_tests(config, domain).__getitem__, config.tasks)
    calibration = [domain.calibration_task(config, test, sample, experiment.device) for test in tests]
    names = experiment.base.names(experiment.family.scope)
    theta_0 = experiment.read(experiment.base, names)
    deltas = [subtract(experiment.read(expert, names), theta_0) for expert in experiment.experts.values()]
    theta = add(theta_0, merge(method, theta_0, deltas, hyper, calibration=calibration))
    examples = {task: used.examples for task, used in zip(config.tasks, calibration, strict=True)}
    tensors = made_by(experiment, lambda name, rows: theta[name].cpu())
    return tensors, {"split": row.data.split, "examples": examples}


def merged_tensors(experiment: Experiment, method: str) -> dict[str, LazyTensor]:
    """Every tensor of the merged model under a merge method, each made when it is written."""
    surveyed, names = survey_of(experiment, method), experiment.base.names(experiment.family.scope)
    parts = {name: parts_of(experiment, method, name) for name in names}
    bar = counted(range(sum(map(len, parts.values()))), "parts")

    def make(name: str, rows: slice) -> Tensor:
        next(bar, None)
        return merged_tensor(experiment, method, name, surveyed, rows)

    return made_by(experiment, make, parts.__getitem__)


def made_by(
    experiment: Experiment,
    make: Callable[[str, slice], Tensor],
    parts: Callable[[str], Sequence[slice]] = lambda name: [WHOLE],
) -> dict[str, LazyTensor]:
    """Every tensor that is merged, made by its name and the rows of each of its parts."""
    shapes = {n: tuple(experiment.base.shapes[n]) for n in experiment.base.names(experiment.family.scope)}
    return {n: LazyTensor(shape, tuple(partial(make, n, rows) for rows in parts(n))) for n, shape in shapes.items()}


def parts_of(experiment: Experiment, method: str, name: str) -> Sequence[slice]:
    """The rows of a tensor that are merged together: all, or some where no weight hangs on others and they are stored
    as they are merged, so that what is in memory stays in the caches of the processor.
    """
    chain = chain_of(method)
    return experiment.rows_of(name) if chain.row.by_weight and chain.parts == (method,) else [WHOLE]


def survey_of(experiment: Experiment, method: str) -> Any:
    """What a method has to know of all merged tensors before the first is made, if anything."""
    names = [name for name in experiment.base.names(experiment.family.scope) if is_merged(experiment, method, name)]
    hyper = experiment.hyper(method)
    return survey(method, lambda: (of_tensor(experiment, name) for name in counted(names, "survey")), hyper)


def is_merged(experiment: Experiment, method: str, name: str) -> bool:
    """Whether a method merges a tensor, or leaves it as the base has it."""
    return chain_of(method).row.scope == "all" or name.startswith(experiment.family.prefixes)


def merged_tensor(experiment: Experiment, method: str, name: str, surveyed: Any, rows: slice = WHOLE) -> Tensor:
    """One tensor of the merged model, or some rows of it, on the CPU."""
    theta, deltas = of_tensor(experiment, name, rows)
    if is_merged(experiment, method, name):
        theta = add(theta, merge(method, theta, deltas, experiment.hyper(method), surveyed))
    return theta[name].cpu()


def of_tensor(experiment: Experiment, name: str, rows: slice = WHOLE) -> tuple[Params, list[Params]]:
    """θ₀ and the τᵢ of one tensor, or of some of its rows. Each expert's is read when its task vector is asked for."""
    theta = {name: experiment.read_rows(experiment.base, name, rows)}
    readers = [partial(experiment.read_rows, expert, rows=rows) for expert in experiment.experts.values()]
    deltas: list[Params] = [lazy_task_vector(reader, theta) for reader in readers]
    if theta[name].numel() <= KEPT and rows == WHOLE:
        deltas = [dict(delta) for delta in deltas]
    return theta, deltas

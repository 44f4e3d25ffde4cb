"""Merged checkpoints: the starts that merge methods make, and the models that adaptation makes of them.

Where they are written, and what they say of themselves, is in layout.py.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import PRETRAINED
from common.core.task_vectors import Params, add, lazy_task_vector, subtract
from common.domain import Domain, first_tests
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint, check_provenance, read_header, read_tensor, write_tensors, write_text
from common.io.examples import Sample
from common.io.tokens import write_with_more
from common.io.unstacked import unstacked
from common.layout import (
    ADAPTATION_FILE,
    PROVENANCE_FILE,
    SAME_REST,
    RunLayout,
    is_finished,
    merge_provenance,
    read_provenance,
)
from common.merging.starts import by_part, chain_of, merge, survey
from common.opening import carry_out
from common.run.engine import Memory, asks_for_workers
from common.run.progress import UnitBar, Units
from common.run.run_log import record_stage

KEPT = 2**20  # weights: of so small a tensor all task vectors are read once and kept


def merge_start(experiment: Experiment, domain: Domain) -> Checkpoint:
    """The checkpoint of the start: the base itself, or what the merge method makes, unless it is on disk already."""
    method = experiment.config.start.method
    if method == PRETRAINED or experiment.config.start.checkpoint:
        return opened_start(experiment)
    folder, provenance = RunLayout(experiment.config).start, merge_provenance(experiment)
    if not is_finished(folder, provenance):
        row = chain_of(method).row
        if asks_for_workers(experiment.config.run) and not (row.data or row.survey):
            merge_in_parts(experiment, domain, method, provenance)
        else:
            with record_stage(experiment.config, f"merge {method}"):
                if row.data:
                    tensors, provenance["data"] = merged_with_data(experiment, domain, method)
                else:
                    tensors = merged_tensors(experiment, method, experiment.base.names(experiment.family.scope))
                finish(experiment, domain, tensors, folder, provenance)
    return opened_start(experiment)


def merge_in_parts(experiment: Experiment, domain: Domain, method: str, provenance: dict[str, Any]) -> None:
    """A merge whose tensors are made part by part, each where run.engine lets it be made, and then put together."""
    layout, groups = RunLayout(experiment.config), merge_groups(experiment)
    largest = max(math.prod(shape) for shape in experiment.base.shapes.values())
    held = 4.0 * largest * (len(experiment.experts) + 6)  # θ₀, each τ if the method keeps them, what becomes of them
    bar = UnitBar(f"merge {method}", len(groups), "parts")
    with record_stage(experiment.config, bar.stage, bar), bar:
        forecast = {"seconds": 0.0, "memory": lambda: Memory(held, held, held)}
        carry_out(merge_each, experiment, range(len(groups)), bar, provenance, writes=layout.part_files, **forecast)
        part_of = {name: layout.part_file(number) for number, group in enumerate(groups) for name in group}
        names = experiment.base.names(experiment.family.scope)
        made = ((name, read_tensor(part_of[name], name)) for name in names)
        finish(experiment, domain, made, layout.start, provenance)
        shutil.rmtree(layout.part_file(0).parent)


def merge_groups(experiment: Experiment) -> list[list[str]]:
    """Names of the merged tensors in parts: those of a block, and every other by itself."""
    names = experiment.base.names(experiment.family.scope)
    blocks = [[name for name in names if name.startswith(prefix)] for prefix in experiment.prefixes]
    return blocks + [[name] for name in experiment.rest_names()]


def merge_each(experiment: Experiment, parts: Iterable[int], bar: Units, provenance: dict[str, Any]) -> None:
    """Merge and store some parts, unless their files are there already."""
    method, groups = experiment.config.start.method, merge_groups(experiment)
    for number in parts:
        file = RunLayout(experiment.config).part_file(number)
        with bar.unit(f"{groups[number][0]} and {len(groups[number]) - 1} more"):
            if file.is_file():
                check_provenance(file, read_header(file), provenance)
                bar.keep()
            else:
                write_tensors(file, dict(merged_tensors(experiment, method, groups[number])), provenance)


def opened_start(experiment: Experiment) -> Checkpoint:
    """The checkpoint of the start, which is there."""
    if experiment.config.start.method == PRETRAINED:
        return experiment.base
    if experiment.config.start.checkpoint:
        return experiment.given_start()
    return unstacked(Checkpoint(RunLayout(experiment.config).start), experiment.family.pieces)


def merged_with_data(
    experiment: Experiment, domain: Domain, method: str
) -> tuple[Iterable[tuple[str, Tensor]], dict[str, Any]]:
    """Every tensor of the merged model under a method that uses data, and how many inputs of which split it used.

    All tensors of the base, of every expert and of the merged model are in memory at once.
    """
    config, chain, hyper = experiment.config, chain_of(method), experiment.hyper(method)
    row, own = chain.row, by_part(chain, hyper)[chain.method]
    assert row.data and domain.calibration_task  # check_choices refuses a domain that has none
    sample = Sample(row.data.split, own["examples"], row.data.batch, own.get("seed", 0))
    first = first_tests(config, domain)
    tests = {task: first[task] for task in config.tasks}
    calibration = [domain.calibration_task(config, test, sample, experiment.device) for test in tests.values()]
    names = experiment.base.names(experiment.family.scope)
    theta_0 = experiment.read(experiment.base, names)
    deltas = [subtract(experiment.read(expert, names), theta_0) for expert in experiment.experts.values()]
    theta = add(theta_0, merge(method, theta_0, deltas, hyper, calibration=calibration))
    examples = {task: used.examples for task, used in zip(tests, calibration, strict=True)}
    return ((name, theta[name].cpu()) for name in names), {"split": row.data.split, "examples": examples}


def merged_tensors(experiment: Experiment, method: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of the merged model under a merge method, one at a time; all, if the method surveys the model."""
    scope, hyper = chain_of(method).row.scope, experiment.hyper(method)
    merged = [name for name in names if scope == "all" or name.startswith(experiment.family.prefixes)]
    surveyed = survey(method, lambda: (of_tensor(experiment, name) for name in merged), hyper)
    for name in names:
        theta, deltas = of_tensor(experiment, name)
        if name in merged:
            theta = add(theta, merge(method, theta, deltas, hyper, surveyed))
        yield name, theta[name].cpu()
        del theta, deltas  # or they would be kept while the next is made


def of_tensor(experiment: Experiment, name: str) -> tuple[Params, list[Params]]:
    """θ₀ and the τᵢ of one tensor. Each expert's is read when its task vector is asked for."""
    theta = experiment.read(experiment.base, [name])
    readers = [partial(read_one, experiment, expert) for expert in experiment.experts.values()]
    deltas: list[Params] = [lazy_task_vector(reader, theta) for reader in readers]
    if theta[name].numel() <= KEPT:
        deltas = [dict(delta) for delta in deltas]
    return theta, deltas


def read_one(experiment: Experiment, checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor, on the device."""
    return experiment.read(checkpoint, [name])[name]


def assemble(experiment: Experiment, domain: Domain, start: Checkpoint, provenance: Mapping[str, Any]) -> bool:
    """Put the adapted blocks and the rest together; False if blocks are missing because they are made elsewhere."""
    layout = RunLayout(experiment.config)
    folder = layout.adapted
    missing = [i for i in range(experiment.depth) if not layout.block_file(i).is_file()]
    if missing:
        print(f"{folder}: not put together yet, blocks {', '.join(map(str, missing))} are missing")
        return False
    curves = {i: read_header(layout.block_file(i))["trace"] for i in range(experiment.depth)}
    write_text(folder / ADAPTATION_FILE, json.dumps({"traces": curves}) + "\n")
    finish(experiment, domain, adapted_tensors(experiment, start), folder, provenance)
    remove_blocks(folder)
    return True


def start_in_base(experiment: Experiment, domain: Domain, start: Checkpoint) -> None:
    """Write the start's blocks within the rest of the pretrained model: what adaptation began from where adapt.rest is
    pretrained, so that its gain can be told from that of the rest.
    """
    folder = start.path.with_name(f"{start.path.name}-{SAME_REST.replace(' ', '-')}")
    start = unstacked(start, experiment.family.pieces)
    inputs = {"start": start.fingerprint(), "base": experiment.base.fingerprint()}
    provenance = {"start": read_provenance(start.path)["start"], "label": SAME_REST, "inputs": inputs}
    if is_finished(folder, provenance):
        return
    rest = set(experiment.rest_names())
    sources = ((n, experiment.base if n in rest else start) for n in experiment.base.names(experiment.family.scope))
    finish(experiment, domain, ((n, source.read([n])[n]) for n, source in sources), folder, provenance)


def remove_blocks(folder: Path) -> None:
    """Remove the adapted blocks of a model that is put together; they may be gone already."""
    shutil.rmtree(folder / "blocks", ignore_errors=True)


def adapted_tensors(experiment: Experiment, start: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adapted model: the fitted blocks, and the rest as adapt.rest says."""
    settings = experiment.config.adapt.for_start(experiment.config.start.method)
    rest = start if settings.rest == "start" else experiment.base
    for name in experiment.rest_names():
        yield name, blended(start, name, rest.read([name])[name], settings.blend)
    for index, prefix in enumerate(experiment.prefixes):
        block = Checkpoint(RunLayout(experiment.config).block_file(index)).read_under("")
        yield from ((prefix + n, blended(start, prefix + n, tensor, settings.blend)) for n, tensor in block.items())


def blended(start: Checkpoint, name: str, adapted: Tensor, blend: float) -> Tensor:
    """One tensor between the start's, at 0, and the adapted one, at 1."""
    if blend == 1:
        return adapted
    theta = start.read([name])[name]
    return theta + blend * (adapted.to(theta) - theta)


def finish(
    experiment: Experiment,
    domain: Domain,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    provenance: Mapping[str, Any],
) -> None:
    """Write a checkpoint and, when it is whole, its provenance."""
    write_model(experiment, domain, tensors, folder)
    write_text(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2, sort_keys=True) + "\n")


def write_model(experiment: Experiment, domain: Domain, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a checkpoint that stock libraries open."""
    domain.export(experiment.config.model, tensors, folder)
    if experiment.matching.more:
        write_with_more(experiment.base.path, folder, experiment.matching.more)

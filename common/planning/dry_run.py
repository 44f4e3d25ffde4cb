"""The dry run: what a config would read, make and need, from headers and one block of each model."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import yaml

from common.assembly import require_free
from common.config import PRETRAINED, Config, as_dict
from common.core.blocks import BlockModule
from common.core.errors import InputError, NotFetched
from common.descent import check_compared, check_descent
from common.domain import Domain, anchored_part, scored_tests
from common.experiment import Experiment
from common.fda.adaptation import shortened
from common.io.absent_models import NOT_FETCHED
from common.io.adapters import is_adapter, open_adapter
from common.io.checkpoints import Checkpoint, check_provenance, read_header
from common.io.hub import is_stand_in
from common.io.tensors import WHOLE
from common.layout import RunLayout
from common.opening import open_inputs
from common.planning.cost import (
    GIB,
    adaptation_memory,
    arithmetic,
    blocks_of,
    construction_memory,
    cost_of_step,
    largest_of,
    memory_in_words,
    size_of,
)
from common.planning.merging import memory_of_merge, memory_with_data
from common.planning.on_paper import Bytes, on_paper
from common.planning.regime import relative_norms, said_of
from common.provenance import (
    anchor_settings,
    fit_settings,
    is_finished,
    merge_settings,
    require_anchors,
    require_own_anchors,
)
from common.start import parts_of, require_merge
from common.validation import check_choices, check_test_data, where_from

Check = Callable[[Experiment, Domain], None]


@dataclass(frozen=True)
class Plan:
    """What --dry-run prints, and the sentences with which the run would refuse; none if it would work."""

    text: str
    refusals: list[str]


class Refusals(dict[str, list[str]]):
    """{input: why the run would refuse it}."""

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Note an InputError of the block as one of this input, and go on behind it."""
        try:
            yield
        except NotFetched:
            pass
        except InputError as error:
            self.setdefault(what, []).append(str(error))


def describe(config: Config, domain: Domain, checks: Iterable[Check] = (), anchored: bool = True) -> Plan:
    """The resolved config, every input as found, refused or missing, the outputs, and what the work needs.

    The inputs are opened and compared by what opens them for a run; `checks` are those of the command besides;
    `anchored` is False of one that merges alone.
    """
    check_choices(config, domain)
    refusals = Refusals()
    experiment = open_inputs(config, domain, refusals.noted, anchored)
    lines = inputs(config, domain, refusals)
    if experiment:
        for check in checks:
            with refusals.noted(""):
                check(experiment, domain)
        with refusals.noted(""):
            fetched = not any(is_stand_in(c.path) for c in (experiment.base, *experiment.experts.values()))
            said = said_of(relative_norms(experiment, [0])) if fetched else "not known before the weights are fetched"
            lines.append(f"  {'‖τ‖/‖θ₀‖':10} in block 0: {said}")
    settings = yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}, sort_keys=False)
    needed = needs(config, domain, experiment)
    text = "\n".join([settings, "Inputs", *lines, "", "Outputs", *outputs(config), "", *needed])
    return Plan(text, list(dict.fromkeys(sentence for of_one in refusals.values() for sentence in of_one)))


def inputs(config: Config, domain: Domain, refusals: Refusals) -> list[str]:
    """One line for each checkpoint and data set; `refusals` is what opening them found, and gets what is missing."""
    lines = [checkpoint_line("base", config.model.path("base"), False, refusals)]
    lines += [checkpoint_line(f"expert {t}", config.model.path("expert", t), True, refusals) for t in config.tasks]
    if config.start.checkpoint:
        lines.append(checkpoint_line("start", config.start.path, False, refusals))
    if config.model.text:
        lines.append(checkpoint_line("text tower", config.model.path("text"), False, refusals))
    for task in config.tasks:
        if config.model.head:
            lines.append(head_line(task, config.model.path("head", task)))
    tests = scored_tests(config, domain)
    for test in tests:
        folder = Path(config.eval.data).expanduser() / test
        lines.append(f"  {where_from(config, domain, test):10} data {test}: {folder}")
    unscored = [task for task in config.tasks if task not in tests.values()]
    return lines + [f"  {'not scored':10} {task}: eval.tests names no test set for it" for task in unscored]


def head_line(task: str, head: Path) -> str:
    """Whether a task's zero-shot head is there."""
    if head in NOT_FETCHED:
        return f"  not fetched head {task}: {NOT_FETCHED[head]}"
    return f"  {'found' if head.is_file() else 'to be made':10} head {task}: {head}"


def checkpoint_line(what: str, path: Path, may_be_adapter: bool, refusals: Refusals) -> str:
    """Whether a checkpoint is there and whole, and goes with the others."""
    try:
        adapter = may_be_adapter and is_adapter(path)
        opened = open_adapter(path)[1] if adapter else Checkpoint(path)
    except NotFetched as note:
        return f"  not fetched {what}: {note}"
    except InputError as error:
        refusals.setdefault(what, [str(error)])
        return f"  {'MISSING':10} {what}: {refusals[what][0]}"
    if what in refusals:
        return f"  {'REFUSED':10} {what}: {'; '.join(refusals[what])}"
    said = ", ".join(filter(None, ("LoRA adapter" if adapter else opened.layout, f"{len(opened.shapes)} tensors")))
    return f"  {'found':10} {what}: {path} ({said})"


# ---- checks of the commands: what each would refuse besides, as far as headers and JSON tell -------------------------


def check_moved_blocks(experiment: Experiment, domain: Domain) -> None:
    """Every expert differs from the base in what is anchored, as far as headers tell."""
    experiment.require_moved_blocks()


def check_anchors_made(experiment: Experiment, domain: Domain) -> None:
    """There are anchors to make, and those that are there already were made with these settings."""
    require_own_anchors(experiment.config)
    layout = RunLayout(experiment.config)
    for task, index in product(experiment.config.tasks, experiment.blocks):
        made_of = anchor_settings(experiment, task, index)
        file, snapshots = layout.anchor_file(task, index), layout.snapshot_file(task, index)
        if file.is_file():
            check_provenance(file, read_header(file), made_of)
        if (steps := experiment.config.anchors.snapshots) and snapshots.is_file():
            check_provenance(snapshots, read_header(snapshots), made_of | {"snapshots": sorted(steps)})


def check_anchors(experiment: Experiment, domain: Domain) -> None:
    """All anchors that an adaptation needs are there, of these settings or in the released layout."""
    require_anchors(experiment)


def check_scored(experiment: Experiment, domain: Domain) -> None:
    """There is something to score models on, if they are to be scored."""
    check_test_data(experiment.config, domain)


def check_export(experiment: Experiment, domain: Domain) -> None:
    """A merged model can be written with all that shall lie beside it."""
    domain.check_export(experiment.config.model)


def check_start(experiment: Experiment, domain: Domain) -> None:
    """The start that is given fits the base; one that is there already was made with these settings."""
    config = experiment.config
    if config.start.checkpoint:
        experiment.given_start()
    elif config.start.method != PRETRAINED:
        require_free(RunLayout(config).start)
        is_finished(RunLayout(config).start, merge_settings(experiment))


def check_merge(experiment: Experiment, domain: Domain) -> None:
    """There is something to merge."""
    require_merge(experiment.config)


def check_adapted(experiment: Experiment, domain: Domain) -> None:
    """An adapted model that is there already was made with these settings."""
    require_free(RunLayout(experiment.config).adapted)
    is_finished(RunLayout(experiment.config).adapted, fit_settings(experiment))


CONSTRUCT: tuple[Check, ...] = (check_scored, check_moved_blocks, check_anchors_made)
STARTED: tuple[Check, ...] = (check_scored, check_export, check_start, check_compared)
MERGE: tuple[Check, ...] = (check_merge, *STARTED)
ADAPT: tuple[Check, ...] = (*STARTED, check_anchors, check_adapted)
EVALUATE: tuple[Check, ...] = (check_descent,)


# ---- what it makes and needs -----------------------------------------------------------------------------------------


def outputs(config: Config) -> list[str]:
    """The folders that would be written, and whether something is there already."""
    layout = RunLayout(config)
    folders = [layout.anchor_folder, layout.adapted]
    if config.start.method != PRETRAINED and not config.start.checkpoint:
        folders.append(layout.start)
    return [f"  {'exists' if f.exists() else 'to be made':10} {f}" for f in folders]


def merged_rows(experiment: Experiment | None, config: Config, name: str) -> Sequence[slice]:
    """The rows of a tensor that are merged together, as far as the models are known."""
    if experiment is None or name not in experiment.base.shapes:
        return [WHOLE]
    return parts_of(experiment, config.start.method, name)


def blocks_in_words(alike: Sequence[BlockModule]) -> str:
    """So many blocks of one kind: the first's name, the number of its tensors, their size."""
    prefix, module = alike[0]
    names = re.sub(r"\.\d+(?=\.)", ".N", prefix).removesuffix(".") if len(alike) > 1 else prefix.removesuffix(".")
    return f"{len(alike)} x {names}, {len(list(module.parameters()))} tensors, {size_of(module) / 2**20:.3g} MiB"


def needs(config: Config, domain: Domain, experiment: Experiment | None = None) -> list[str]:
    """Units, disk, memory and arithmetic, counted on blocks without weights (the meta device), the largest of each."""
    try:
        skeleton, (family, kinds, shape) = domain.skeleton(config.model), blocks_of(config, domain)
    except InputError as error:
        return [f"Needs: not known yet ({error})"]
    depth, largest = sum(map(len, kinds)), largest_of(kinds)
    anchors, blocks = math.prod(shape) * 4, len(config.run.blocks or range(depth))
    units = blocks * len(config.tasks)
    precision = arithmetic(config, largest, shape)
    steps = [cost_of_step(family.pure(group[0].module), group[0].module, shape, config, precision) for group in kinds]
    operations = sum(len(group) * work.operations for group, (work, _) in zip(kinds, steps, strict=True)) / depth
    construction = max((ledger for _, ledger in steps), key=lambda ledger: ledger.peak)
    adaptation = adaptation_memory(config, family, largest, shape)
    dtype = getattr(torch, config.model.dtype or "float32")
    merged = {n: shape for n, shape in sorted(family.stored(skeleton).items()) if n.startswith(family.scope)}
    weights = list(map(math.prod, merged.values()))
    passing = 2 * 4 * max(weights)  # on its way from one file into another: as it is read, and as it is stored
    settings = config.adapt.for_start(config.start.method)
    epochs = shortened(settings.epochs, settings.speedup)
    every = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    anchored = sum(len(group) * size_of(group[0].module) for group in kinds) * dtype.itemsize // 4
    sizes = Bytes(every, anchored * blocks // depth, anchors * units)
    rows = {
        "blocks": "; ".join(map(blocks_in_words, kinds))
        + (f"; anchored part {anchored_part(config, domain)}" if len(domain.PARTS) > 1 else "")
        + f"; D {shape[2]}",
        "anchors of a unit": f"{' x '.join(map(str, shape))}, {anchors / 2**20:.1f} MiB",
        "construct": f"{units} units of {config.anchors.steps} steps, {operations / 1e9:.1f} GFLOP a step, "
        f"{operations * units * (config.anchors.steps + 1) / 1e15:.2f} PFLOP in all",
        "construct, in": precision,
        "construct, memory": memory_in_words(*construction_memory(construction, largest, shape)),
        "construct, disk": f"{anchors * units / GIB:.2f} GiB",
        "adapt": f"{blocks} units of {epochs} epochs, {len(config.tasks) * shape[0]} anchors each",
        "adapt, memory": memory_in_words(*adaptation._replace(host=max(adaptation.host, passing))),
        **memory_of_merge(config, merged, family.prefixes, passing, partial(merged_rows, experiment, config)),
        **memory_with_data(config, sum(weights)),
        "merge, disk": f"{every / GIB:.2f} GiB a model in {dtype}",
        "libraries": "about 0.9 GiB of host memory besides",
        **on_paper(config, family, kinds, shape, sizes),
    }
    return ["Needs", *(f"  {what:18} {much}" for what, much in rows.items())]
